"""Low-rank terms of the LLM train in every layout as with Hugging Face's model in one process, and the whole pipeline
takes them along."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import mappings

from mome_dist import evaluate, transcribe
from mome_dist import report as report_command
from mome_dist.adapters.tensor_parallel import TensorParallelLoRA, TermsOfTokens
from mome_dist.checkpoint.average import write_average
from mome_dist.checkpoint.format import CheckpointReader, checkpoints_of
from mome_dist.checkpoint.reshard import reshard
from mome_dist.checkpoint.saved import read_checkpoint
from mome_dist.config import load_config
from mome_dist.data.corpus import Corpus
from mome_dist.data.media import encode_flac
from mome_dist.errors import UserError
from mome_dist.export.adapter import export_adapter
from mome_dist.inference.load import load_run
from mome_dist.model.build import build_distributed
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.training.step import forward_backward
from mome_dist.verification.probe import Probe, shrunk, wake
from mome_dist.verification.run import Case
from mome_dist.verification.verify import Verifier
from tests import tiny_llms
from tests.parallel.resharding import STEPS, TAG, train_and_save
from tests.parallel.runs import Lab, lines, losses_by_view, validation_step
from tests.parallel.same_checkpoints import assert_engines_go_on, assert_same_files
from tests.parallel.worlds import run_world

VIEWS = [
    "task.asr_audio_rates=[4]",
    "task.vsr_video_rates=[2]",
    "task.avsr_audio_rates=[4,16]",
    "task.avsr_video_rates=[5]",
]
RATES, TASKS = "[shared,rates]", "[shared,task]"


def _case(name: str, world: int, zero: int = 0, dispatch: str = "local", **layout: object) -> Case:
    return Case(name, Layout.for_world(world, **layout), zero, dispatch)  # type: ignore[arg-type]


CASES = {
    case.name: case
    for case in (
        _case("one process", 1),
        _case("tp2", 2, tp=2),
        _case("tp2 sp zero1", 2, 1, tp=2, sequence_parallel=True),
        _case("tp2 sp zero2", 2, 2, tp=2, sequence_parallel=True),
        _case("pp2 zero1", 2, 1, pp=2),
        _case("pp2 interleaved", 2, pp=2, virtual=2),
        _case("dp2 zero2", 2, 2),
        _case("recompute full", 1, recompute="full"),
        _case("tp2 sp recompute full", 2, tp=2, sequence_parallel=True, recompute="full"),
        _case("ep2 zero1", 2, 1, "alltoall", ep=2),
        _case("ep2 gather zero2", 2, 2, "gather", ep=2),
        _case("tp2 ep2 sp zero1", 4, 1, "gather", tp=2, ep=2, sequence_parallel=True),
    )
}


def _probe(folder: Path, terms: str, *more: str) -> Probe:
    """Terms of rank 4 in a small LLM; without experts, if ``more`` does not say otherwise."""
    settings = ["experiment=tiny", "llm.precision=fp32", "parallel=single", *VIEWS, *more]
    settings += [f"llm.lora={{rank: 4, scale: 0.5, terms: {terms}}}"]
    return Probe(shrunk(load_config(settings), folder), steps=3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verifier]:
    """Runs without experts, by terms."""
    folder = tmp_path_factory.mktemp("plain")
    return {terms: Verifier(_probe(folder / terms, terms, "mome=none")) for terms in (RATES, TASKS)}


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    """A run whose experts lie beside the same attention."""
    mome = ["mome=mhsa", "mome.balance_loss=0.1", "mome.z_loss=0.01", "mome.capacity_factor=null"]
    return Verifier(_probe(tmp_path_factory.mktemp("experts"), RATES, *mome))


def _check(verifier: Verifier, name: str, optimizer: str) -> None:
    verdict = verifier.check(CASES[name], optimizer)
    assert verdict.passed, (verdict.failure, verdict.comparison)


@pytest.mark.parametrize(
    ("name", "optimizer", "terms"),
    [
        ("one process", "adamw", RATES),
        ("tp2", "sgd", RATES),
        ("tp2", "adamw", TASKS),
        ("tp2 sp zero1", "sgd", TASKS),
        ("tp2 sp zero2", "adamw", RATES),
        ("pp2 zero1", "sgd", RATES),
        ("pp2 zero1", "adamw", TASKS),
        ("pp2 interleaved", "sgd", RATES),
        ("dp2 zero2", "sgd", RATES),
        ("dp2 zero2", "adamw", TASKS),
        ("recompute full", "sgd", TASKS),
        ("tp2 sp recompute full", "sgd", RATES),
    ],
)
def test_layouts_train_as_one_process(plain: dict[str, Verifier], name: str, optimizer: str, terms: str) -> None:
    _check(plain[terms], name, optimizer)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("tp2", "adamw"), ("ep2 zero1", "sgd"), ("ep2 gather zero2", "adamw"), ("tp2 ep2 sp zero1", "sgd")],
)
def test_beside_experts_too(with_experts: Verifier, name: str, optimizer: str) -> None:
    _check(with_experts, name, optimizer)


def test_kept_projectors_leave_nothing_to_learn_before_the_layers(plain: dict[str, Verifier]) -> None:
    for case in (CASES["recompute full"], CASES["tp2 sp zero1"], CASES["pp2 zero1"]):
        verdict = plain[RATES].check(dataclasses.replace(case, train_projectors=False), "sgd")
        assert verdict.passed, (verdict.failure, verdict.comparison)


@pytest.mark.parametrize("name", ["tp2", "tp2 sp zero1"])
def test_a_qwen2_has_biases_and_narrow_values(tmp_path: Path, name: str) -> None:
    probe, llm = _probe(tmp_path / "llama", f"{TASKS}, start: b_random", "mome=none"), tmp_path / "qwen"
    tiny_llms.save(tiny_llms.qwen2(tie_word_embeddings=False), llm)
    probe.config.llm = dataclasses.replace(probe.config.llm, path=str(llm))
    _check(Verifier(probe), name, "sgd")


def test_bf16_stays_near_one_process(tmp_path: Path) -> None:
    verifier = Verifier(_probe(tmp_path, RATES, "mome=none"))
    verdict = verifier.check(dataclasses.replace(CASES["tp2 sp zero1"], precision="bf16"), "sgd")
    assert verdict.passed, (verdict.failure, verdict.comparison)


def _gradients_of_own_heads_only() -> None:
    mappings.copy_to_tensor_model_parallel_region = lambda x, group=None: x


def _every_term_for_every_token() -> None:
    found = TermsOfTokens.__call__
    TermsOfTokens.__call__ = lambda self, *args: found(self, *args) * 0 + 0.5  # type: ignore[method-assign]


def _values_added_to_keys() -> None:
    forward = TensorParallelLoRA.forward

    def shifted(self, hidden, qkv, groups, context):  # type: ignore[no-untyped-def]
        head = qkv.shape[-1] // groups // 4
        return forward(self, hidden, qkv.clone().roll(-head, -1), groups, context).roll(head, -1)

    TensorParallelLoRA.forward = shifted  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [_gradients_of_own_heads_only, _every_term_for_every_token, _values_added_to_keys])
def test_the_verification_catches(plain: dict[str, Verifier], fault: Callable[[], None]) -> None:
    verdict = plain[RATES].check(CASES["tp2"], "sgd", plant=fault)
    found = verdict.comparison.mismatches if verdict.comparison is not None else ()
    disagree = verdict.failure is not None and "ranks disagree on the gradient norm" in verdict.failure
    assert disagree or any("llm_lora." in mismatch.name for mismatch in found), (verdict.failure, found)


def _gradients_of(probe: Probe, case: Case, kept: list[int]) -> dict[str, bool]:
    """Whether each low-rank tensor of this rank has a gradient with a number other than zero, after a step of some of
    the views; one without any gradient is an error."""
    with parallel_world(case.layout, 0, timeout_seconds=60) as at:
        model = build_distributed(probe.config, case.layout, probe.widths, case.dispatch, torch.device("cpu")).train()
        wake(model.trained_parts(), probe.config.seed)
        every = probe.views
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Probe, "views", [every[number] for number in kept])
            step = probe.step(0, at.dp, case.layout)
        forward_backward(model, step)
        found = {}
        for part in model.trained_parts():
            if part.name.startswith("llm_lora."):
                assert part.parameter.grad is not None, part.name
                found[part.name] = bool(part.of(part.parameter.grad).any())
        return found


@pytest.mark.parametrize("name", ["tp2", "tp2 sp recompute full", "dp2 zero2"])
def test_a_term_that_no_token_uses_has_a_gradient_of_exact_zeros(plain: dict[str, Verifier], name: str) -> None:
    case, probe = CASES[name], plain[RATES].probe
    ranks = run_world(_gradients_of, case.layout.world_size, probe, case, [0, 3])
    used = tuple(f".{term}." for term in ("shared", "asr_4", "avsr_16_5"))
    # Under sequence parallelism a rank's own tokens may all be of one view.
    found = {name for rank in ranks for name, any_there in rank.items() if any_there}
    assert found == {name for name in ranks[0] if any(each in name for each in used)}


TRAINED_ON = {
    "tp2 sp zero1": (Layout.for_world(2, tp=2, sequence_parallel=True), 1),
    "tp2 zero0": (Layout.for_world(2, tp=2), 0),
}
MOVED_TO = {
    "one process zero1": (Layout.for_world(1), 1),
    "pp2 zero2": (Layout.for_world(2, pp=2), 2),
    "tp2 pp2 zero1": (Layout.for_world(4, tp=2, pp=2), 1),
}


@pytest.mark.parametrize("source", TRAINED_ON)
@pytest.mark.parametrize("experts", [False, True], ids=["plain", "experts"])
def test_checkpoints_move_between_layouts(tmp_path: Path, source: str, experts: bool) -> None:
    """Engines load what is written for them, since the order of their parameters follows from names alone."""
    mome = "mome.capacity_factor=null" if experts else "mome=none"
    probe = _probe(tmp_path / "llm", RATES, mome, "optimizer.epsilon=1e-2", "task.avsr_audio_rates=[4,16,10]")
    probe.config.optimizer = dataclasses.replace(probe.config.optimizer, warmup_steps=0)
    probe.config.llm.pad_heads = True
    layout, zero = TRAINED_ON[source]
    losses = run_world(train_and_save, layout.world_size, probe, layout, zero, tmp_path)[0]
    canonical = tmp_path / f"checkpoints/step-{STEPS:06d}"
    with CheckpointReader(canonical) as reader:
        reader.verify()
        names = [name for name in reader.names("model/") if "llm_lora.3.q." in name]
        terms = ("shared", "asr_4", "vsr_2", "avsr_4_5", "avsr_10_5", "avsr_16_5")
        assert sorted(names) == sorted(f"model/llm_lora.3.q.{term}.{factor}" for term in terms for factor in "ab")
        entry = reader.index["tensors"]["model/llm_lora.3.v.avsr_16_5.b"]
        assert entry["shape"] == [16, 4] and entry["sharing"]["sliced"] == 0 and entry["sharing"]["layer"] == 3
        moment = reader.read("optimizer/exp_avg/llm_lora.1.q.asr_4.b")
        assert all(half.abs().max() > 0 for half in moment.chunk(2)), "a rank's slice is missing"
    reshard(canonical, tmp_path / "mine", "deepspeed", layout, zero)
    assert_same_files(tmp_path / f"mine/global_step{STEPS}", tmp_path / "native" / TAG)
    assert_engines_go_on(probe, canonical, tmp_path, (layout, zero), MOVED_TO, losses)
    with pytest.raises(UserError, match=r"llm\.lora adds to heads .* parallel\.tp=4 does not divide its 2 key-value"):
        reshard(canonical, tmp_path / "tp4", "deepspeed", Layout.for_world(4, tp=4), 1)
    saved = read_checkpoint(canonical)
    write_average(tmp_path / "mean", [saved, saved])
    mean = read_checkpoint(tmp_path / "mean").weights
    assert all(torch.equal(mean[name], value) for name, value in saved.weights.items())


TERMS = "llm.lora={reduction: 16, scale: 0.5, terms: [shared, rates]}"
STEADY = [TERMS, "optimizer.epsilon=1e-2", "optimizer.final_fraction=1", "task.views_per_step=null"]


def _decoded(run: Path, target: Path, sound: Path, cache: Path) -> list[dict[str, float]]:
    """Validation losses of a run, of its export and of the run before training; the export transcribes a file, by a
    view that it was trained on and not by another."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    export_adapter(run, target)
    assert report_command.main([f"run={run}"]) == 0
    assert transcribe.main([str(target), str(sound), "--audio-rate", "4"]) == 0
    assert transcribe.main([str(target), str(sound), "--audio-rate", "5"]) != 0
    runs = [load_run(run), load_run(target), load_run(run, weights=False)]
    return [losses_by_view(each, validation_step(each)) for each in runs]


def _evaluated(arguments: list[str], cache: Path) -> int:
    os.environ["MOME_DIST_CACHE"] = str(cache)
    return evaluate.main(arguments)


def test_the_whole_pipeline(lab: Lab, tiny_corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The ledger watches every run: each slice trains, moves, and is whole in the checkpoint."""
    run, more = tmp_path / "run", ["mome=none", *STEADY, "training.validate_every=3"]
    straight = lab.train(2, run, *more, "training.steps=6", tp=2)
    resized = tmp_path / "resized"
    lab.train(2, resized, *more, "training.steps=3", tp=2)
    rest = lab.train(2, resized, *more, "training.steps=5", pp=2) + lab.train(1, resized, *more, "training.steps=6")
    assert rest == pytest.approx(straight[3:], rel=1e-5)

    sound = tmp_path / "sound.flac"
    sound.write_bytes(encode_flac(tiny_corpus.audio(tiny_corpus.split("test")[0])))
    trained, exported, untrained = run_world(_decoded, 1, run, tmp_path / "export", sound, lab.cache)[0]
    logged = lines(run / "metrics.jsonl")[-1]["validation"]
    assert exported == trained and trained.keys() == logged.keys()
    for view, loss in logged.items():
        assert trained[view] == pytest.approx(loss, rel=1e-5)
        assert abs(untrained[view] / loss - 1) > 1e-3
    refused = "asr(5) needs low-rank terms that this model's LLM does not have; it was trained on asr(4)"
    assert refused in capfd.readouterr().err
    # 4 layers, 64 wide with values 32 wide, of rank 64 / 16, for all views and for each of 8 pairs.
    one = 4 * 4 * (3 * 64 + 32)
    card = (tmp_path / "export/README.md").read_text()
    assert "MoME" not in card and "\ntags:\n- adapter\n" in card and "Projectors and LoRA from frozen encoders" in card
    cited = card.partition("## Citation")[2]
    assert "Llama-MTSK" in cited and "Llama-AVSR" in cited and "Omni-AVSR" not in cited
    assert f"{9 * one:,} LoRA of the language model" in card and f"active a token | {2 * one:,} |" in card
    assert "query and value projections: `{reduction: 16, scale: 0.5," in card
    assert f"{2 * one:,} active per token, {9 * one:,} trained" in (run / "report/report.md").read_text()
    assert (run / "report/lora.png").is_file()

    arguments = [f"checkpoint={run}", "baselines=[untrained]", "limit=2", "max_new_tokens=3"]
    assert run_world(_evaluated, 1, arguments, lab.cache) == [0]
    results = json.loads((run / "evaluation/results.json").read_text())
    assert results["trainable_parameters"]["llm_lora"] == 9 * one


def test_a_run_starts_from_one_without_terms_and_keeps_its_projectors(lab: Lab, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    before = lab.train(1, first, "mome=none", "training.steps=4")
    start = ["mome=none", TERMS, f"training.init_from={first}", "projector.trainable=false"]
    assert lab.train(2, second, *start, "training.steps=20", "task.views_per_step=1", tp=2)[0] < before[0]
    weights = [read_checkpoint(checkpoints_of(run)[0]).weights for run in (first, second)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert all(weights[1][name].any() for name in weights[1].keys() - weights[0].keys())


@pytest.mark.parametrize("key", ["training.resume=true", "training.init_from"])
@pytest.mark.parametrize("other", ["{reduction: 16, scale: 0.25, terms: [shared, rates]}", "null", "{rank: 4}"])
def test_other_terms_are_refused(lab: Lab, tmp_path: Path, key: str, other: str) -> None:
    run = tmp_path / "run"
    lab.train(1, run, "mome=none", *STEADY, "training.steps=2")
    if key == "training.init_from":
        arguments, place = [f"{key}={run}"], tmp_path / "other"
    else:
        arguments, place = [key], Path(shutil.copytree(run, tmp_path / "copy"))
    refusal = r"was trained with llm\.lora=\{reduction: 16, scale: 0.5, .*now it is .*: set it back, or "
    with pytest.raises(RuntimeError, match=refusal):
        lab.train(1, place, "mome=none", f"llm.lora={other}", "training.steps=3", *arguments)


def test_another_rank_is_refused(lab: Lab, tmp_path: Path) -> None:
    lab.train(1, tmp_path, "mome=none", *STEADY, "training.steps=2")
    other = TERMS.replace("reduction: 16", "rank: 5")
    with pytest.raises(RuntimeError, match=r"llm_lora\.0\.\S+ has shape \[4, 64\], configured is \[5, 64\]"):
        lab.train(1, tmp_path, "mome=none", other, "training.steps=3")


def test_heads_are_not_padded_beside_terms(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"llm\.lora adds to heads that are the LLM's own.*does not divide its 2 key"
    ):
        lab.train(4, tmp_path, "mome=none", TERMS, "llm.pad_heads=true", tp=4)
