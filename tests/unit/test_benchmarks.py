"""The benchmark scripts at a tiny size: their documented commands keep working, and what they count is right."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from benchmarks import (
    data_speed,
    decode,
    encoder_padding,
    encoder_sound,
    launches,
    learning,
    long_film,
    methods,
    moe_layer,
    padding_wer,
    plan_layout,
    reshard,
    results,
    routers,
    save_stall,
    step_parts,
    train_step,
)
from benchmarks import forms as expert_forms
from benchmarks.form_options import CASES
from benchmarks.gpu import told
from benchmarks.step_parts import PROJECTOR_SIZE, WIDTHS
from benchmarks.step_peer import RANK, PeftStep
from mome_dist import evaluate
from mome_dist.config import load_config, save_config
from mome_dist.config.derived import views_of
from mome_dist.evaluation.results import RESULTS, read_results
from mome_dist.files import write_json
from mome_dist.llm.tiny import save_llm, tiny_llama, word_tokenizer
from mome_dist.model.distributed import MicroBatch
from mome_dist.moe.forms.registry import FORMS
from mome_dist.moe.routers.registry import ROUTERS
from mome_dist.parallel.forked import fork_ranks
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.speech.sequence import pack
from mome_dist.training.batches import Step
from mome_dist.training.step import forward_backward
from tests.evaluation_run import make_run

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, BOTTLENECK, EXPERTS, RANKS = 32, 4, 6, 2
ROUNDS = ("--rounds", "1", "--warm-up", "0")  # whoever wants figures takes more
Run = Callable[..., dict[str, Any]]


def _forked(module: str, processes: int, arguments: Sequence[str]) -> int:
    """A world of a module on forks of this process, which has imported what takes a new one ten seconds."""
    main = importlib.import_module(module).main

    def run() -> int:
        main(arguments)
        return 0

    return max(rank.wait() for rank in fork_ranks(run, processes))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a benchmark with the arguments of its command; return its JSON file."""
    monkeypatch.setattr(results, "launch", _forked)

    def run(benchmark: ModuleType, *arguments: str) -> dict[str, Any]:
        out = tmp_path / "results"
        assert benchmark.main([*arguments, "--results", str(out)]) == 0
        (path,) = out.glob("*.json")
        markdown = path.with_suffix(".md").read_text()
        assert markdown in capsys.readouterr().out
        assert str(ROOT) not in markdown.replace(str(tmp_path), "")
        stored = json.loads(path.read_text())
        assert f"` at {stored['commit']}\n" in markdown
        return stored

    return run


def test_a_long_film_takes_less_memory_than_its_pictures(run: Run) -> None:
    cases = run(long_film, "--minutes", "0.1")["figures"]["cases"]
    assert set(cases) == set(long_film.WORK)
    assert cases["sound"]["film seconds"] == pytest.approx(6, abs=0.2)
    assert cases["mouths"]["pictures"] == 150 and cases["mouths"]["utterances"] == 1
    assert all(case["peak"] < 500e6 for case in cases.values())


def test_the_layer_benchmark_measures_and_predicts_every_candidate(run: Run) -> None:
    # Five experts, which two processes cannot share: six are taken.
    sizes = f"--tokens 24 --shapes {HIDDEN}x{BOTTLENECK}x5 --processes {RANKS}"
    (layer_case,) = run(moe_layer, *sizes.split(), *ROUNDS)["figures"]
    assert layer_case["experts"] == EXPERTS and layer_case["processes"] == RANKS
    assert set(layer_case["candidates"]) == {"deepspeed", "alltoall", "gather"}
    for name, candidate in layer_case["candidates"].items():
        assert 0 < candidate["least"] <= candidate["milliseconds"] <= candidate["most"]
        assert (candidate["predicted"] is None) == (name == "deepspeed")
    predicted = {name: each["predicted"] for name, each in layer_case["candidates"].items() if each["predicted"]}
    assert layer_case["auto"] == min(predicted, key=lambda name: predicted[name])
    _check_bytes(layer_case)


def test_the_router_benchmark_measures_every_router_with_every_dispatch_that_it_knows(run: Run) -> None:
    cases = run(routers, *f"--tokens 24 --shape {HIDDEN}x{BOTTLENECK}x5 --processes 1 2".split(), *ROUNDS)["figures"]
    assert [(case["processes"], case["dispatch"]) for case in cases] == [
        (1, "alltoall"),
        (1, "local"),
        (2, "alltoall"),
        (2, "gather"),
    ]
    for case in cases:
        found = {name for name, kind in ROUTERS.items() if case["dispatch"] in kind.settings.dispatches}
        assert set(case["routers"]) == found
        for router in case["routers"].values():
            assert 0 < router["least"] <= router["milliseconds"] <= router["most"] and 0 < router["used"] <= 8
        assert case["routers"]["top_k"]["used"] == 4


def test_the_form_benchmark_measures_every_form_and_what_it_sends(run: Run) -> None:
    cases = run(expert_forms, *["--tokens", "24", "--hidden", "192", "--processes", "1", "2"], *ROUNDS)["figures"]
    assert {CASES[name].form for name in CASES} == set(FORMS)
    assert [(case["processes"], case["dispatch"]) for case in cases] == [
        (1, "alltoall"),
        (1, "local"),
        (2, "alltoall"),
        (2, "gather"),
    ]
    for case in cases:
        assert set(case["forms"]) == set(CASES)
        for form in case["forms"].values():
            assert 0 < form["least"] <= form["milliseconds"] <= form["most"]
            assert (form["bytes"] > 0) == (case["processes"] > 1)
    tokens = cases[2]["forms"]  # those of latent experts travel with 48 values and not 192
    assert tokens["latent"]["bytes"] < 0.3 * tokens["bottleneck"]["bytes"]


def test_the_layer_benchmark_measures_peers_in_one_process(run: Run) -> None:
    # Rows of four units are eight bytes, which grouped products do not take.
    shapes = f"--tokens 24 --shapes {HIDDEN}x{BOTTLENECK}x5 {HIDDEN}x8x5 --processes 1"
    narrow, wide = run(moe_layer, *shapes.split(), *ROUNDS)["figures"]
    peers = {"megatron", *(f"transformers {name}" for name in ("eager", "batched_mm", "grouped_mm"))}
    assert set(wide["candidates"]) == {"deepspeed", "alltoall", "local"} | peers and wide["failed"] == {}
    assert set(narrow["failed"]) == {"transformers grouped_mm"} == peers - set(narrow["candidates"])
    fastest = min(wide["candidates"][name]["milliseconds"] for name in ("deepspeed", *peers))
    assert moe_layer.lead(wide) == fastest / wide["candidates"][wide["auto"]]["milliseconds"]


def _check_bytes(layer_case: dict[str, Any]) -> None:
    """They are those of the tensors that travel."""
    sent = {name: candidate["bytes_sent"] for name, candidate in layer_case["candidates"].items()}
    parameters = EXPERTS // RANKS * (2 * HIDDEN * BOTTLENECK + HIDDEN + BOTTLENECK)
    counts = 8 * (2 * EXPERTS + 2)  # asked, dropped, tokens, positions: summed, there and back
    # Its own weights in bf16 to the other rank, the gradients of the other's in fp32, and its counts.
    assert sent["gather"] == parameters * (2 + 4) + counts
    # DeepSpeed sends half of a buffer of as many rows for every expert, four times, and agrees on the number by an
    # all-reduce. What travels here are rows that were asked for: this rank's own that go to the other one, with their
    # gates, and the gradients of their results; the results of the other's that came, and their gradients and gates'.
    # How many rows there are follows from routes and tokens, which are gathered before.
    counts += 8 * (EXPERTS + 1)
    assert sent["deepspeed"] - 8 > sent["alltoall"] - counts
    row = 2 * HIDDEN
    routes = (sent["alltoall"] - counts) / (2 * row + 4)
    assert routes == int(routes) and 0 < routes <= 2 * 24 * 4


@pytest.fixture(scope="module")
def small_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer, path = word_tokenizer(["a few words"]), tmp_path_factory.mktemp("llm")
    save_llm(tiny_llama(tokenizer, hidden=64, layers=2, ffn_width=96), tokenizer, path)
    return path


def test_the_step_benchmark_splits_a_step(run: Run, small_llm: Path) -> None:
    sizes = f"--experts 4 --bottleneck 2 --clips 2 --processes {RANKS}"
    (case,) = run(train_step, "--llm", str(small_llm), *sizes.split(), *ROUNDS)["figures"]
    for form, milliseconds in case["milliseconds"].items():
        step = milliseconds.pop("step")
        assert len(milliseconds) == 3 and all(part > 0 for part in milliseconds.values()), form
        assert max(milliseconds.values()) < step
    # A router, two of the four routed experts and a shared one in each of two layers.
    layer = 4 * 64 + 3 * (2 * 64 * 2 + 64 + 2)
    added = case["trained parameters"]["mome"] - case["trained parameters"]["projectors"]
    assert added == 2 * layer


def test_the_step_benchmark_measures_transformers_with_peft(run: Run, small_llm: Path) -> None:
    sizes = "--experts 4 --bottleneck 2 --clips 2 --processes 1"
    (case,) = run(train_step, "--llm", str(small_llm), *sizes.split(), *ROUNDS)["figures"]
    # The same projectors, and two matrices beside the query and the value projection of each of two layers.
    lora = case["peer"]["trained parameters"] - _projectors()
    narrow = 64 // 2  # two of four heads are of keys and values
    assert lora == 2 * RANK * ((64 + 64) + (64 + narrow))
    assert train_step.times_peft(case) > 0


def test_the_step_benchmark_takes_the_sizes_of_a_known_llm(run: Run) -> None:
    sizes = "--shape smollm2-135m --layers 1 --experts 4 --bottleneck 2 --clips 1 --processes 1"
    (case,) = run(train_step, *sizes.split(), *ROUNDS)["figures"]
    added = case["trained parameters"]["mome"] - case["trained parameters"]["projectors"]
    assert added == 4 * 576 + 5 * (2 * 576 * 2 + 576 + 2)


def _projectors() -> int:
    norm = 2 * 64
    return sum(width * PROJECTOR_SIZE + PROJECTOR_SIZE + PROJECTOR_SIZE * 64 + 64 + norm for width in WIDTHS.values())


def _losses(llm: Path, file: Path) -> int:
    """Ours and the peer's for the same clips and projectors; LoRA and MoME start at zero."""
    options = train_step.parse_arguments(["--llm", str(llm), "--experts", "4", "--clips", "3", "--precision", "fp32"])
    with parallel_world(Layout.for_world(1), 0, 60):
        trained = step_parts.build("mome", options, Layout.for_world(1))
        peer = PeftStep(llm, WIDTHS, PROJECTOR_SIZE, torch.float32)
        (chunk,) = trained.model.parts()
        assert chunk.projectors is not None
        values = iter(chunk.projectors.parameters())
        for parameter in peer.projectors.parameters():
            parameter.data.copy_(next(values).detach())
        assert next(values, None) is None
        sequences, features = step_parts.clips_of(step_parts.VIEWS, [2.0, 2.7, 2.2])
        batch = MicroBatch(pack(sequences), features)
        ours = forward_backward(trained.model, Step([batch], step_parts.VIEWS, 3 * (step_parts.TEXT_TOKENS + 1), 3))
        write_json(file, [len(step_parts.VIEWS) * ours.loss, peer(sequences, features)])
    return 0


def test_transformers_with_peft_has_our_loss(small_llm: Path, tmp_path: Path) -> None:
    (rank,) = fork_ranks(_losses, 1, small_llm, tmp_path / "losses.json")
    assert rank.wait() == 0
    ours, peers = json.loads((tmp_path / "losses.json").read_text())
    assert ours == pytest.approx(peers, rel=1e-5)


def test_the_benchmark_of_decoding_measures_both_forms(run: Run, small_llm: Path) -> None:
    sizes = "--experts 4 --bottleneck 2 --prefix 14 --tokens 3 --precision fp32"
    figures = run(decode, "--llm", str(small_llm), *sizes.split(), *ROUNDS)["figures"]
    assert figures["precision"] == "fp32" and list(figures["searches"]) == list(decode.SEARCHES)
    for name, forms in figures["searches"].items():
        assert set(forms) == set(decode.FORMS)
        clips, _ = decode.SEARCHES[name]
        for form in forms.values():
            assert form["tokens"] == 3 * clips and form["milliseconds"] > 0 and form["CPU milliseconds"] > 0


def test_the_resharding_benchmark_writes_what_it_says(run: Run) -> None:
    medians = run(reshard, "--gigabytes", "0.01", *ROUNDS)["figures"]["medians"]
    assert medians["copy"]["of_copy"] == 1
    assert medians["canonical"]["bytes"] == pytest.approx(medians["copy"]["bytes"], rel=0.02)
    # Weights twice and two moments, instead of weights and two moments.
    assert medians["deepspeed"]["bytes"] == pytest.approx(4 / 3 * medians["copy"]["bytes"], rel=0.1)
    assert all(each["peak"] < 1e9 for each in medians.values())


def test_the_benchmark_of_saving_measures_every_form(run: Run, small_llm: Path) -> None:
    sizes = f"--experts 4 --bottleneck 2 --clips 2 --processes {RANKS}"
    (case,) = run(save_stall, "--llm", str(small_llm), *sizes.split(), *ROUNDS)["figures"]
    assert case["bytes"] > 0 and case["wait"]["no checkpoint"] < case["wait"]["written between steps"]
    assert set(case["two steps"]) == set(case["wait"]) and all(value > 0 for value in case["two steps"].values())


def test_the_benchmark_of_data_times_every_transform(run: Run, tiny_corpus_dir: Path) -> None:
    figures = run(data_speed, "--corpus", str(tiny_corpus_dir), "--clips", "2", "--rounds", "1")["figures"]
    assert figures["clips"] == 2 and 2 < figures["seconds of speech"] < 12
    assert len(figures["seconds"]) == 11 and all(seconds > 0 for seconds in figures["seconds"].values())


def test_clips_are_read_and_augmented_faster_than_aimed_at() -> None:
    figures = json.loads((ROOT / "benchmarks/results/data_speed.json").read_text())["figures"]
    assert figures["seconds of speech"] / figures["seconds"][data_speed.EVERYTHING] >= 20


def test_the_benchmark_of_padding_tells_cost_and_difference(run: Run) -> None:
    figures = run(encoder_padding, "--rounds", "1")["figures"]
    committed = json.loads((ROOT / "benchmarks/results/encoder_padding.json").read_text())["figures"]
    whole, own = (figures["cpu seconds"][way] for way in ("30s", "clip"))
    assert whole["encoding"] > 3 * own["encoding"] > own["spectrogram"] > 0
    for key in ("cosine", "difference"):
        assert figures[key] == pytest.approx(committed[key], rel=1e-3)
    assert encoder_padding.summary(committed) in " ".join((ROOT / "docs/how-to/configure.md").read_text().split())


def test_the_learning_benchmark_compares_what_was_trained(tmp_path: Path, tiny_corpus_dir: Path) -> None:
    """Its tables from two finished evaluations; trainings are those of the commands that it starts."""
    arguments = ["--experiments", "tiny", "--runs", str(tmp_path / "runs"), "training.steps=7"]
    options = learning.parse_arguments(arguments)
    models = learning.models_of(options)
    assert [model.directory.name for model in models] == ["tiny", "tiny-asr_16", "tiny-vsr_5", "tiny-avsr_16_5"]
    assert "28 training steps are left" in learning.plan(models, options)
    fixed = load_config(learning.training_arguments(models[3]))
    assert [str(view) for view in views_of(fixed)] == ["avsr(16,5)"] and fixed.task.views_per_step == 1
    small = make_run(tmp_path / "small", tiny_corpus_dir)
    for model, beams in zip(models[:2], (1, 3), strict=True):
        model.directory.mkdir(parents=True)
        place = [f"output={model.directory / 'evaluation'}", f"checkpoint={small}", "rates=asr(16)"]
        assert evaluate.main([*learning.evaluation_arguments(model, options)[1:], *place, f"num_beams={beams}"]) == 0
    figures = learning.figures_of(models[:2], 1)
    assert [row["condition"] for row in figures["comparisons"]] == [
        "clean",
        *(f"babble {x} dB" for x in (-5, 0, 5, 10)),
    ]
    text = "\n".join(learning.render(figures, ["tiny"]))
    learning.draw(figures, ["tiny"], tmp_path)
    assert all((tmp_path / name).is_file() for name in re.findall(r"\((\w+\.png)\)", text))
    assert learning.verdict({"low": -2.0, "high": -0.1}) == "one for all"
    assert learning.verdict({"low": -2.0, "high": 0.1}) == "not told apart"


def test_the_benchmark_of_methods_tells_what_each_was_trained_on(tmp_path: Path, tiny_corpus_dir: Path) -> None:
    """Its table from a finished evaluation; trainings are those of the commands that it starts."""
    options = methods.parse_arguments(
        ["--methods", "mome", "omni_avsr/st", "--runs", str(tmp_path), "training.steps=7"]
    )
    models = methods.models_of(options)
    assert "14 training steps are left" in learning.plan(models, options)
    omni = load_config(learning.training_arguments(models[1]))
    assert omni.video_encoder.lora is None and omni.data.features == "cached" and omni.task.sampling == "rates"
    small = make_run(tmp_path / "small", tiny_corpus_dir)
    place = [f"output={models[1].directory / 'evaluation'}", f"checkpoint={small}", "rates=asr(16)"]
    assert evaluate.main([*learning.evaluation_arguments(models[1], options)[1:], *place]) == 0
    save_config(omni, models[1].directory / "config.yaml")
    figures = methods.figures_of(models[1:])
    assert figures["views_per_step"] == {"omni_avsr/st": 3}
    (row,) = re.findall(r"^\| `omni_avsr/st` \|.*$", "\n".join(methods.render(figures)), re.M)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == "3" and [number for number, cell in enumerate(cells[3:]) if cell != "-"] == [1]


def test_the_benchmark_of_padding_in_words_differs_in_nothing_else(tmp_path: Path, tiny_corpus_dir: Path) -> None:
    """Its table from a finished evaluation; trainings are those of the commands that it starts."""
    options = padding_wer.parse_arguments(["--runs", str(tmp_path / "runs"), "training.steps=7"])
    models = padding_wer.models_of(options)
    whole, own = (load_config(learning.training_arguments(model)) for model in models)
    assert (whole.audio_encoder.padding, own.audio_encoder.padding) == ("30s", "clip")
    assert replace(whole, audio_encoder=own.audio_encoder, output_dir=own.output_dir, name=own.name) == own
    small = make_run(tmp_path / "small", tiny_corpus_dir)
    place = [f"output={tmp_path / 'evaluation'}", f"checkpoint={small}", "rates=asr(16)"]
    assert evaluate.main([*learning.evaluation_arguments(models[0], options)[1:], *place]) == 0
    text = "\n".join(padding_wer.render({"clip": read_results(tmp_path / "evaluation" / RESULTS)}))
    rows = re.findall(r"^\| `clip` \|.*$", text, re.M)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[1] for row in cells] == ["clean", "babble 0 dB"]
    assert all([number for number, cell in enumerate(row[2:]) if cell != "-"] == [1] for row in cells)


def test_documented_commands_are_understood() -> None:
    page = (ROOT / "benchmarks/README.md").read_text()
    commands = re.findall(r"^python -m benchmarks\.([\w.]+) *([^#\n]*)", page, re.M)
    scripts = {"moe_layer": moe_layer, "plan_layout": plan_layout, "reshard": reshard}
    scripts |= {
        "learning": learning,
        "methods": methods,
        "save_stall": save_stall,
        "train_step": train_step,
        "data_speed": data_speed,
    }
    scripts |= {"decode": decode, "encoder_padding": encoder_padding, "padding_wer": padding_wer, "launches": launches}
    scripts |= {"encoder_sound": encoder_sound, "long_film": long_film, "routers": routers, "forms": expert_forms}
    scripts |= {f"gpu.{name}": module for name, module in told.MODULES.items()}
    assert {name for name, _ in commands} == set(scripts)
    for name, arguments in commands:
        scripts[name].parse_arguments(shlex.split(arguments))


def test_committed_tables_say_what_made_them() -> None:
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        stored = json.loads(path.read_text())
        assert stored["command"].startswith("python -m benchmarks.") and stored["machine"]["processor"]
        assert stored["command"] in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_committed_layer_tables_hold_what_is_aimed_at(precision: str) -> None:
    cases = json.loads((ROOT / f"benchmarks/results/moe_layer_{precision}.json").read_text())["figures"]
    sizes = [(case["processes"], case["hidden_size"], case["bottleneck"]) for case in cases]
    both = set(itertools.product((1, 2, 4), (576, 2048), (12, 128)))  # each with few experts and with 64
    assert Counter(sizes) == {**dict.fromkeys(both, 2), **{(processes, 3072, 12): 1 for processes in (1, 2, 4)}}
    assert max(map(moe_layer.excess, cases)) <= 0.10, "auto takes little longer than the best"
    ratios = [moe_layer.speed_up(case, case["auto"]) for case in cases if case["bottleneck"] == 12]
    text = " ".join((ROOT / "benchmarks/README.md").read_text().split())
    assert min(ratios) > 1, "faster in every case; how much, depends on how fast the processor's memory is"
    told = f"{precision}: {min(ratios):.2f} to {max(ratios):.2f} times"
    assert told in text, f"the README does not tell the table's figures: {told}"


def test_the_readme_of_the_benchmarks_tells_which_aims_the_layer_misses() -> None:
    text = " ".join((ROOT / "benchmarks/README.md").read_text().split())
    alone, several = {}, []
    for precision in ("bf16", "fp32"):
        for case in json.loads((ROOT / f"benchmarks/results/moe_layer_{precision}.json").read_text())["figures"]:
            ratio = moe_layer.speed_up(case, case["auto"])
            if case["bottleneck"] == 12 and case["hidden_size"] >= 2048:
                if case["processes"] > 1:
                    several.append(round(ratio, 2))
                elif case["experts"] == 23:
                    alone[case["hidden_size"], precision] = ratio
    assert f"at 2048 ({alone[2048, 'bf16']:.2f} in bf16, {alone[2048, 'fp32']:.2f} in fp32)" in text
    assert f"misses it at 3072 ({alone[3072, 'bf16']:.2f}, {alone[3072, 'fp32']:.2f})" in text
    assert "several processes reach it once" in text and sum(ratio >= 5 for ratio in several) == 1


def test_the_readme_of_the_benchmarks_tells_what_the_committed_step_table_says() -> None:
    cases = json.loads((ROOT / "benchmarks/results/train_step.json").read_text())["figures"]
    assert {case["processes"] for case in cases} == {1, 2}
    longer = []
    for case in cases:
        for parts in case["milliseconds"].values():
            step = parts.pop("step")
            assert sum(parts.values()) == pytest.approx(step, rel=0.05), "medians of the parts make up the step"
            parts["step"] = step
        plain, mome = (case["milliseconds"][form]["step"] for form in ("projectors", "mome"))
        longer.append(f"{mome / plain - 1:.0%}")
    text = " ".join((ROOT / "benchmarks/README.md").read_text().split())
    assert f"{longer[0]} longer in one process and {longer[1]} in two" in text
    (alone,) = [case for case in cases if case["peer"]]
    assert f"With MoME, a step is {train_step.times_peft(alone):.2f} times as fast." in text
    missed = "The aim of twice is missed on this processor" in text
    assert missed == (train_step.times_peft(alone) < 2), "a missed aim is told, and only a missed one"


def test_committed_plans_hold_what_is_aimed_at() -> None:
    cases = json.loads((ROOT / "benchmarks/results/plan_layout.json").read_text())["figures"]["cases"]
    assert len(cases) >= 8 and {case["processes"] for case in cases} == {1, 2, 4}
    for stage in (stage for case in cases for stage in case["stages"]):
        assert stage["predicted"] == pytest.approx(stage["measured"], rel=0.10)
    measured = [case["seconds"] for case in cases]
    assert spearmanr(measured, [case["predicted seconds"]["total"] for case in cases]).statistic >= 0.9


def test_the_readme_of_the_benchmarks_tells_what_was_learned() -> None:
    figures = json.loads((ROOT / "benchmarks/results/learning.json").read_text())["figures"]
    by_case = {
        name: {(view["view"], view["snr"]): view for view in evaluation["views"]}
        for name, evaluation in figures["evaluations"].items()
    }
    gains = []
    for audio, video, snr in itertools.product((4, 16), (2, 5), (-5, 0)):
        for name in ("tiny", "tiny_noise"):
            both, alone = by_case[name][f"avsr({audio},{video})", snr], by_case[name][f"asr({audio})", snr]
            assert both["wer_high"] < alone["wer_low"], "lips help in babble, outside both intervals"
        if snr == -5:
            gains.append(by_case["tiny"][both["view"], snr]["wer"] - by_case["tiny_noise"][both["view"], snr]["wer"])
    text = " ".join((ROOT / "benchmarks/README.md").read_text().split())
    assert f"takes off another {min(gains):.0f} to {max(gains):.0f} points at -5 dB" in text
    together = [case for case in figures["comparisons"] if case["view"] == "avsr(16,5)"]
    assert len(together) == 5 and all(case["low"] <= 0 <= case["high"] for case in together)
    (lips,) = [case for case in figures["comparisons"] if case["view"] == "vsr(5)"]
    assert lips["low"] > 0
