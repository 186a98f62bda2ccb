"""Whole runs: every layout trains alike, twice is the same, resuming continues, and decoding sees what was trained."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mome_dist.checkpoint.format import CONFIG, CheckpointReader, find_checkpoint
from mome_dist.config import load_config
from mome_dist.config.load import load_saved_config
from mome_dist.errors import UserError
from mome_dist.preflight import validate
from mome_dist.training.loop import train
from mome_dist.training.precision import FROZEN
from tests.parallel.runs import Lab, lines, reference_validation
from tests.parallel.worlds import run_world


@pytest.fixture(scope="module")
def one_process(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return lab.train(1, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(
    ("world", "tp", "pp", "ep", "zero"), [(2, 1, 1, 2, "zero1"), (4, 2, 2, 1, "zero2"), (8, 2, 2, 2, "zero1")]
)
def test_losses_equal_one_process(
    lab: Lab, one_process: list[float], tmp_path: Path, world: int, tp: int, pp: int, ep: int, zero: str
) -> None:
    losses = lab.train(world, tmp_path, f"deepspeed={zero}", tp=tp, pp=pp, ep=ep)
    np.testing.assert_allclose(losses, one_process, rtol=1e-5)
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_layers_in_graphs_train_alike(lab: Lab, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rehearsed, on two data-parallel ranks."""
    settings = ["mome.dispatch=local", "data.accumulation=auto", "data.microbatch_tokens=400", "training.steps=3"]
    losses = lab.train(2, tmp_path / "without", *settings)
    capfd.readouterr()
    np.testing.assert_allclose(lab.train(2, tmp_path / "with", *settings, "llm.graphs=rehearsal"), losses, rtol=1e-5)
    found = re.search(
        r"layers in graphs: (\d+) microbatches .* (\d+) captured; (\d+) microbatches", capfd.readouterr().err
    )
    assert found is not None
    replayed, captured, larger = map(int, found.groups())
    assert replayed > captured > 0 == larger


def test_the_same_seed_gives_the_same_losses_and_another_seed_does_not(lab: Lab, tmp_path: Path) -> None:
    first = lab.train(2, tmp_path / "first", "mome.capacity_factor=1.25", ep=2)
    assert lab.train(2, tmp_path / "second", "mome.capacity_factor=1.25", ep=2) == first
    assert lab.train(2, tmp_path / "third", "mome.capacity_factor=1.25", "seed=1", ep=2) != first


def _train_where(overrides: list[str], cache: Path, with_bf16: list[int]) -> list[float]:
    """Train on CPUs of which those of some ranks multiply bf16 in hardware."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    can = int(os.environ["RANK"]) in with_bf16
    torch.cpu.get_capabilities = lambda: {"avx512_bf16": can}  # type: ignore[assignment]
    config = load_config(overrides)
    return train(config, validate(config, int(os.environ["WORLD_SIZE"])))


@pytest.mark.parametrize(("with_bf16", "precision"), [([0, 1], "bf16"), ([0], "fp32")])
def test_all_ranks_train_in_what_all_have_hardware_for(
    lab: Lab, tmp_path: Path, with_bf16: list[int], precision: str
) -> None:
    """A run goes on in the precision that it began with, wherever it is resumed."""
    steps, run = ["training.steps=4", "training.save_every=2"], tmp_path / "auto"
    told, open_ones = ([f"{frozen}.precision={way}" for frozen in FROZEN] for way in (precision, "auto"))
    explicit = lab.train(2, tmp_path / "explicit", *steps, *told, ep=2)
    automatic = [*lab.overrides(run), *steps, *open_ones, "parallel.ep=2"]
    assert run_world(_train_where, 2, automatic, lab.cache, with_bf16) == [explicit] * 2
    saved = load_saved_config(run / CONFIG)
    assert {getattr(saved, frozen).precision for frozen in FROZEN} == {precision}
    shutil.rmtree(run / "checkpoints/step-000004")
    (run / "checkpoints/latest").write_text("step-000002")
    elsewhere = [] if precision == "bf16" else [0, 1]
    assert run_world(_train_where, 2, automatic, lab.cache, elsewhere) == [explicit[2:]] * 2


@pytest.mark.parametrize(
    ("world", "tp", "pp", "ep", "zero", "exact"),
    [(2, 1, 1, 2, "zero1", True), (1, 1, 1, 1, "zero0", False), (4, 2, 2, 1, "zero2", False)],
)
def test_resuming_continues_at_any_layout(
    lab: Lab, tmp_path: Path, world: int, tp: int, pp: int, ep: int, zero: str, exact: bool
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    losses = lab.train(2, whole, "training.steps=6", "training.save_every=3", ep=2)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints/step-000006")
    (broken / "checkpoints/latest").write_text("step-000003")
    rest = lab.train(world, broken, "training.steps=6", f"deepspeed={zero}", tp=tp, pp=pp, ep=ep)
    if exact:
        assert rest == losses[3:]
    np.testing.assert_allclose(rest, losses[3:], rtol=1e-5)
    assert [record["step"] for record in lines(broken / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    with CheckpointReader(find_checkpoint(whole)) as one, CheckpointReader(find_checkpoint(broken)) as other:
        for kind in ("model/", "optimizer/"):
            assert set(one.names(kind)) == set(other.names(kind))
        assert (one.content == other.content) == exact
        for name in one.names("model/"):
            torch.testing.assert_close(one.read(name), other.read(name), rtol=0, atol=0 if exact else 2e-5)


def test_frozen_projectors_stay_those_of_the_run_that_trained_them(lab: Lab, tmp_path: Path) -> None:
    lab.train(2, tmp_path / "first", ep=2)
    frozen = ["projector.trainable=false", f"training.init_from={tmp_path / 'first'}"]
    with pytest.raises(RuntimeError, match=r"name the run that trained them with training\.init_from"):
        lab.train(1, tmp_path / "random", frozen[0])
    losses = lab.train(2, tmp_path / "second", *frozen, ep=2)
    np.testing.assert_allclose(lab.train(4, tmp_path / "other", *frozen, tp=2, pp=2), losses, rtol=1e-5)
    resumed = lab.train(2, tmp_path / "second", *frozen, "training.steps=6", ep=2)
    assert len(resumed) == 1
    with (
        CheckpointReader(find_checkpoint(tmp_path / "first")) as before,
        CheckpointReader(find_checkpoint(tmp_path / "second")) as after,
    ):
        assert set(before.names("model/")) == set(after.names("model/"))
        assert not after.names("optimizer/exp_avg/projectors") and after.names("optimizer/exp_avg/mome")
        for name in before.names("model/"):
            same = torch.equal(before.read(name), after.read(name))
            assert same == name.startswith("model/projectors"), name


@pytest.mark.parametrize("placement", ["mhsa", "ffn", "layer"])
def test_the_decoding_model_has_the_losses_of_the_training_model(lab: Lab, tmp_path: Path, placement: str) -> None:
    lab.train(4, tmp_path, f"mome={placement}", "mome.routed_experts=8", "training.validate_every=5", tp=2, pp=1, ep=2)
    validation = lines(tmp_path / "metrics.jsonl")[-1]["validation"]
    expected = run_world(reference_validation, 1, tmp_path, lab.cache)[0]
    assert validation.keys() == expected.keys() and len(expected) == 8
    for view, loss in validation.items():
        assert loss == pytest.approx(expected[view], rel=1e-5)


def test_a_checkpoint_of_another_frozen_model_is_refused(lab: Lab, tmp_path: Path, tiny_corpus_dir: Path) -> None:
    lab.train(1, tmp_path / "run", "training.steps=1")
    other = Lab.make(tiny_corpus_dir, tmp_path / "other")
    config = other.llm / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000', '"rope_theta": 20000'))
    with pytest.raises(RuntimeError, match=r"was trained with another llm: set llm\.path"):
        other.train(1, tmp_path / "run", "training.steps=2")
    with pytest.raises(UserError, match="there is no such folder; name a run"):
        find_checkpoint(tmp_path / "nothing")
