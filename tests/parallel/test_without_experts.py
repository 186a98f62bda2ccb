"""A run without experts is a run: every layout trains it as one process does, and the whole pipeline works on it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mome_dist import report as report_command
from mome_dist import transcribe
from mome_dist.checkpoint.average import write_average
from mome_dist.checkpoint.format import CheckpointReader, checkpoints_of
from mome_dist.checkpoint.reshard import reshard
from mome_dist.checkpoint.saved import read_checkpoint
from mome_dist.config import load_config
from mome_dist.data.corpus import Corpus
from mome_dist.data.media import encode_flac
from mome_dist.export.adapter import export_adapter, export_checkpoint
from mome_dist.inference.load import load_run
from mome_dist.parallel.layout import Layout
from mome_dist.verification.cases import standard_cases
from mome_dist.verification.probe import Probe, shrunk
from mome_dist.verification.verify import Verifier
from tests.parallel import sliced
from tests.parallel.resharding import STEPS, TAG, train_and_save
from tests.parallel.runs import Lab, evaluated
from tests.parallel.same_checkpoints import assert_engines_go_on, assert_same_files
from tests.parallel.worlds import run_world

ONE_VIEW_EACH = ["task.asr_audio_rates=[4]", "task.vsr_video_rates=[2]", "task.avsr_audio_rates=[16]"]
PROBE = [
    "experiment=tiny",
    "llm.precision=fp32",
    "mome=none",
    "parallel=single",
    *ONE_VIEW_EACH,
    "task.avsr_video_rates=[5]",
]
CASES = {case.name: case for case in standard_cases(experts=False)}
VERIFIED = ["dp2 zero0", "tp2 sp", "pp2 zero0", "tp2 pp2 zero2", "pp2 recompute full", "pp2 interleaved"]


def _probe(folder: Path, *more: str) -> Probe:
    return Probe(shrunk(load_config([*PROBE, *more]), folder), steps=3)


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    return Verifier(_probe(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize(("name", "optimizer"), [(name, "sgd") for name in VERIFIED] + [("tp2 pp2 zero2", "adamw")])
def test_layouts_train_as_one_process(verifier: Verifier, name: str, optimizer: str) -> None:
    verdict = verifier.check(CASES[name], optimizer)
    assert verdict.passed, (verdict.failure, verdict.comparison)


@pytest.fixture
def adapters() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        sliced.attach(patch)
        yield


@pytest.mark.parametrize("name", ["tp2 sp", "tp2 pp2 zero2"])
def test_what_else_trains_in_layers_needs_no_experts(adapters: None, tmp_path: Path, name: str) -> None:
    verdict = Verifier(_probe(tmp_path)).check(CASES[name], "sgd")
    assert verdict.passed, (verdict.failure, verdict.comparison)


TRAINED_ON = {"dp2 zero1": (Layout.for_world(2), 1), "tp2 zero0": (Layout.for_world(2, tp=2), 0)}
MOVED_TO = {
    "pp2 zero1": (Layout.for_world(2, pp=2), 1),
    "tp2 pp2 zero0": (Layout.for_world(4, tp=2, pp=2), 0),
    "dp2 zero2": (Layout.for_world(2), 2),
}


@pytest.mark.parametrize("source", TRAINED_ON)
def test_engines_load_what_is_written_for_them(tmp_path: Path, source: str) -> None:
    probe, (layout, zero) = _probe(tmp_path / "llm", "optimizer.epsilon=1e-2"), TRAINED_ON[source]
    probe.config.optimizer = dataclasses.replace(probe.config.optimizer, warmup_steps=0)
    losses = run_world(train_and_save, layout.world_size, probe, layout, zero, tmp_path)[0]
    canonical = tmp_path / f"checkpoints/step-{STEPS:06d}"
    reshard(canonical, tmp_path / "mine", "deepspeed", layout, zero)
    assert_same_files(tmp_path / f"mine/global_step{STEPS}", tmp_path / "native" / TAG)
    assert_engines_go_on(probe, canonical, tmp_path, (layout, zero), MOVED_TO, losses)


def _from_there_on(run: Path, folder: Path, sound: Path, cache: Path) -> str:
    """Export a run in two ways, report on it, and write down a file with the export."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    export_adapter(run, folder / "export")
    export_checkpoint(folder / "native", folder / "export of native")
    assert report_command.main([f"run={run}"]) == 0
    assert transcribe.main([str(folder / "export"), str(sound), "--audio-rate", "4"]) == 0
    return (folder / "export/README.md").read_text()


def test_the_whole_pipeline(lab: Lab, tiny_corpus: Corpus, tmp_path: Path) -> None:
    run, more = tmp_path / "run", ["mome=none", "optimizer.final_fraction=1", "training.validate_every=3"]
    straight = lab.train(2, tmp_path / "straight", *more, "training.steps=6")
    lab.train(2, run, *more, "training.steps=3")
    resumed = lab.train(2, run, *more, "training.steps=6")
    assert resumed == straight[3:]
    resized = tmp_path / "resized"
    lab.train(2, resized, *more, "training.steps=3")
    assert lab.train(4, resized, *more, "training.steps=6", tp=2, pp=2) == pytest.approx(straight[3:], rel=1e-4)

    newest = checkpoints_of(run)[0]
    with CheckpointReader(newest) as reader:
        assert {name.split("/")[-1].split(".")[0] for name in reader.names("model/")} == {"projectors"}
    reshard(newest, tmp_path / "native", "deepspeed", Layout.for_world(4, tp=2, pp=2), 1)
    write_average(tmp_path / "mean", [read_checkpoint(path) for path in checkpoints_of(run)])

    arguments = [f"checkpoint={run}", "baselines=[chance,untrained]", "limit=2", "max_new_tokens=3"]
    assert run_world(evaluated, 2, arguments, lab.cache) == [0, 0]
    results = json.loads((run / "evaluation/results.json").read_text())
    assert results["trainable_parameters"]["mome"] == 0 < results["trainable_parameters"]["projectors"]

    sound = tmp_path / "sound.flac"
    sound.write_bytes(encode_flac(tiny_corpus.audio(tiny_corpus.split("test")[0])))
    card = run_world(_from_there_on, 1, run, tmp_path, sound, lab.cache)[0]
    assert "without experts" in card and "Experts:" not in card and "bottleneck" not in card
    one, other = (tmp_path / name / "model.safetensors" for name in ("export", "export of native"))
    assert one.read_bytes() == other.read_bytes()
    page = (run / "report/report.md").read_text()
    assert "| MoME | none |" in page and "Expert load" not in page and "Expert activations" not in page


def test_a_dense_bottleneck_is_evaluated_exported_and_reported_without_a_router(
    lab: Lab, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    run, more = tmp_path / "run", ["method=dense_bottleneck", "training.save_every=1"]
    lab.train(2, run, *more, "training.steps=2")
    newest = checkpoints_of(run)[0]
    reshard(newest, tmp_path / "native", "deepspeed", Layout.for_world(4, tp=2, pp=2), 1)
    write_average(tmp_path / "mean", [read_checkpoint(path) for path in checkpoints_of(run)])
    assert run_world(evaluated, 1, [f"checkpoint={run}", "limit=2", "max_new_tokens=3"], lab.cache) == [0]
    assert not (run / "evaluation/activations.safetensors").exists() and not (run / "routing.jsonl").exists()
    sound = tmp_path / "sound.flac"
    sound.write_bytes(encode_flac(tiny_corpus.audio(tiny_corpus.split("test")[0])))
    card = run_world(_from_there_on, 1, run, tmp_path, sound, lab.cache)[0]
    trained, exported = (load_run(place).model.state_dict() for place in (run, tmp_path / "export of native"))
    assert trained.keys() == exported.keys() and all(torch.equal(trained[name], exported[name]) for name in trained)
    numbers = sum(value.numel() for name, value in trained.items() if name.startswith("mome."))
    assert numbers == 4 * (2 * 64 * 311 + 311 + 64)  # layers of the laboratory's LLM, and its hidden size
    assert f"{numbers:,} MoME" in card and "without a router" in card and "routed" not in card
    page = (run / "report/report.md").read_text()
    assert "bottleneck of width 311; no router" in page and f"{numbers:,} trained" in page
    assert "Expert load" not in page and "Expert activations" not in page and "| router |" not in page


def test_encoders_learn_without_experts_and_beside_kept_projectors(lab: Lab, tmp_path: Path) -> None:
    lora = ["data.features=online", "audio_encoder.lora={rank: 2, alpha: 4}", "task.tasks=[asr]"]
    first = tmp_path / "first"
    lab.train(2, first, "mome=none", *lora, "training.steps=4")
    kept = ["projector.trainable=false", f"training.init_from={first}"]
    lab.train(2, tmp_path / "second", "mome=none", *lora, *kept, "training.steps=4", tp=2)
    before, after = (read_checkpoint(checkpoints_of(run)[0]).weights for run in (first, tmp_path / "second"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("projectors."), name


def test_experts_of_a_checkpoint_are_not_dropped_without_a_word(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lab.train(1, run, "training.steps=1", "mome.dispatch=local")
    with pytest.raises(RuntimeError, match=r"holds mome\.\d+\.\w+.*, which the configured model has not: resume with"):
        lab.train(1, run, "training.steps=2", "mome=none")
