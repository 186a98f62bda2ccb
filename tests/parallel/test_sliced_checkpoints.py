"""Slices of tensor-parallel ranks are whole in a checkpoint, and come back at any tensor-parallel size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mome_dist.checkpoint.average import write_average
from mome_dist.checkpoint.format import CONFIG, CheckpointReader
from mome_dist.checkpoint.reshard import reshard
from mome_dist.checkpoint.saved import read_checkpoint
from mome_dist.config import load_config
from mome_dist.errors import UserError
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.parts import NamedPart
from mome_dist.verification.probe import Probe, shrunk, write_random_llama
from tests.parallel import sliced
from tests.parallel.resharding import STEPS, TAG, forget_sharing, load_and_train, train_and_save
from tests.parallel.runs import Lab
from tests.parallel.worlds import run_world

WHOLE = {"down_weight": [8, 3], "down_bias": [8], "low_weight": [3, 32], "up_weight": [32, 8], "up_bias": [32]}
TENSOR_PARALLEL = {
    "tp1 zero1": (Layout.for_world(1), 1),
    "tp4 zero0": (Layout.for_world(4, tp=4), 0),
    "tp4 sp zero2": (Layout.for_world(4, tp=4, sequence_parallel=True), 2),
    "tp2 pp2 zero1": (Layout.for_world(4, tp=2, pp=2), 1),
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint of two tensor-parallel ranks, and the losses of the steps after it."""

    probe: Probe
    folder: Path
    losses: list[float]

    @property
    def canonical(self) -> Path:
        return self.folder / f"checkpoints/step-{STEPS:06d}"


@pytest.fixture(scope="module", autouse=True)
def adapters() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        sliced.attach(patch)
        yield


@pytest.fixture(scope="module", params=[0, 1], ids=["zero0", "zero1"])
def trained(request: pytest.FixtureRequest, adapters: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("sliced")
    overrides = ["experiment=tiny", "llm.precision=fp32", "mome.capacity_factor=null", "optimizer.warmup_steps=0"]
    overrides += ["optimizer.epsilon=1e-2", "training.steps=5", "task.tasks=[asr]", "task.asr_audio_rates=[4]"]
    config = shrunk(load_config(overrides), folder / "other")
    config.llm.path = str(write_random_llama(folder / "llm", kv_heads=4))  # four ranks share them
    probe = Probe(config, STEPS)
    layout = Layout.for_world(2, tp=2, sequence_parallel=True)
    losses = run_world(train_and_save, 2, probe, layout, request.param, folder)
    return Trained(probe, folder, losses[0])


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of the model and the optimiser; every hash is checked."""
    with CheckpointReader(checkpoint) as reader:
        reader.verify()
        return {name: reader.read(name) for name in (*reader.names("model/"), *reader.names("optimizer/"))}


def test_a_checkpoint_holds_whole_tensors_and_says_how_they_are_shared(trained: Trained) -> None:
    with CheckpointReader(trained.canonical) as reader:
        for number in range(4):
            for name, shape in WHOLE.items():
                for kind in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
                    entry = reader.index["tensors"][f"{kind}/adapter.{number}.{name}"]
                    assert entry["shape"] == shape and len(entry["parts"]) == 1
                    assert entry["sharing"]["sliced"] == sliced.SLICED.get(name)
                    assert entry["sharing"]["layer"] == number
        moment = reader.read("optimizer/exp_avg/adapter.1.up_weight")
        assert all(half.abs().max() > 0 for half in moment.chunk(2, dim=1)), "a rank's slice is missing"


@pytest.mark.parametrize("target", TENSOR_PARALLEL)
def test_resharded_to_another_size_and_back_no_bit_changes(trained: Trained, tmp_path: Path, target: str) -> None:
    layout, zero = TENSOR_PARALLEL[target]
    reshard(trained.canonical, tmp_path / "canonical", "canonical", layout, zero)
    native, scratch = tmp_path / "native", tmp_path / "scratch"
    reshard(tmp_path / "canonical", native, "deepspeed", layout, zero)
    scratch.mkdir()
    arguments = (trained.probe, layout, zero, native, trained.canonical, scratch)
    for rank in run_world(load_and_train, layout.world_size, *arguments):
        assert rank.different == []
        assert rank.losses == pytest.approx(trained.losses, rel=1e-6)
    reshard(native, tmp_path / "back", "canonical", Layout.for_world(2, tp=2), 1)
    before, after = tensors_of(trained.canonical), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_does_not_say_how_it_is_shared_is_refused_and_not_guessed(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter\.0\.\w+ is a trained tensor of which the checkpoint does not say"):
        layout = Layout.for_world(1)
        reshard(trained.folder / "native" / TAG, tmp_path / "x", "canonical", layout, 1, trained.canonical / CONFIG)
    copy = tmp_path / "copy"
    reshard(trained.canonical, copy, "canonical", Layout.for_world(1), 1)
    forget_sharing(copy)
    with pytest.raises(UserError, match=r"adapter\.0\.\w+ is a trained tensor of which the checkpoint does not say"):
        reshard(copy, tmp_path / "x", "canonical", Layout.for_world(1), 1)


def test_a_size_that_does_not_divide_them_is_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"parallel\.tp=3 does not divide a trained tensor of shape \[8"):
        reshard(trained.canonical, tmp_path / "x", "canonical", Layout.for_world(3, tp=3), 1)


def test_an_average_is_of_whole_tensors(trained: Trained, tmp_path: Path) -> None:
    saved = read_checkpoint(trained.canonical)
    write_average(tmp_path / "mean", [saved, saved])
    with CheckpointReader(tmp_path / "mean") as reader, CheckpointReader(trained.canonical) as source:
        for name in reader.names("model/"):
            mine, theirs = reader.index["tensors"][name], source.index["tensors"][name]
            assert {key: mine[key] for key in ("shape", "sha256", "sharing")} == {
                key: theirs[key] for key in ("shape", "sha256", "sharing")
            }


def test_a_run_resumes_at_other_sizes(lab: Lab, tmp_path: Path) -> None:
    """The ledger watches every run: each slice trains, moves, and is whole in the checkpoint."""
    more = ["llm.pad_heads=true", "mome.dispatch=local", "optimizer.epsilon=1e-2", "task.views_per_step=null"]
    more += ["optimizer.final_fraction=1"]  # the rate does not depend on how many steps there will be
    expected = lab.train(2, tmp_path / "straight", "training.steps=6", *more, tp=2)
    lab.train(2, tmp_path / "resized", "training.steps=3", *more, tp=2)
    resized = lab.train(4, tmp_path / "resized", "training.steps=5", "parallel.sequence_parallel=true", *more, tp=4)
    resized += lab.train(1, tmp_path / "resized", "training.steps=6", *more)
    assert resized == pytest.approx(expected[3:], rel=1e-5)


def test_the_ledger_names_a_tensor_of_which_only_a_slice_was_saved(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NamedPart, "gathered", NamedPart.of)
    message = r"adapter\.0\.down_bias trains with shape \[8\], but step-000005 holds \[4\] of it"
    with pytest.raises(RuntimeError, match=message):
        lab.train(2, tmp_path / "run", "mome.dispatch=local", "task.views_per_step=null", tp=2)
