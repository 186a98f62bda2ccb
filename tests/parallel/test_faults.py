"""Runs that something happens to: they stop together, skip together, and continue as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from mome_dist.checkpoint.format import CheckpointReader, find_checkpoint
from mome_dist.config import load_config
from mome_dist.errors import PreemptedError
from mome_dist.preflight import validate
from mome_dist.training import loop
from tests.parallel.runs import Lab, lines
from tests.parallel.worlds import run_world


@pytest.fixture(scope="module")
def unbroken(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return lab.train(2, tmp_path_factory.mktemp("unbroken"), "training.steps=6", ep=2)


def _train_until_told(overrides: list[str], cache: Path, number: int, at_step: int) -> str:
    """Train; rank 1 alone gets a signal during a step, as a scheduler's signal may reach ranks at different times."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    config = load_config(overrides)
    forward_backward, steps = loop.forward_backward, 0

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal steps
        steps += 1
        if steps == at_step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        return forward_backward(*args, **kwargs)

    loop.forward_backward = counted
    try:
        loop.train(config, validate(config, int(os.environ["WORLD_SIZE"])))
    except PreemptedError as stop:
        os.kill(os.getpid(), number)  # the other rank was told, and this one hears of it only now
        return str(stop)
    return ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_stops_all(
    lab: Lab, unbroken: list[float], tmp_path: Path, number: signal.Signals
) -> None:
    overrides = lab.overrides(tmp_path, "parallel.ep=2", "training.steps=6")
    told = run_world(_train_until_told, 2, overrides, lab.cache, int(number), 3)
    assert all(text == "asked to stop: saved after step 3 of 6; start again to continue" for text in told)
    assert find_checkpoint(tmp_path).name == "step-000003"
    assert lab.train(2, tmp_path, "training.steps=6", ep=2) == unbroken[3:]


def _train_with_bad_gradients(overrides: list[str], cache: Path, bad_steps: list[int]) -> list[float]:
    """Train; in some steps a gradient of rank 0 is not a number."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    config = load_config(overrides)
    forward_backward, steps = loop.forward_backward, 0

    def spoiled(model, *args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal steps
        steps += 1
        result = forward_backward(model, *args, **kwargs)
        if steps in bad_steps and os.environ["RANK"] == "0":
            next(model.trainable_modules().parameters()).grad.view(-1)[0] = torch.nan
        return result

    loop.forward_backward = spoiled
    return loop.train(config, validate(config, int(os.environ["WORLD_SIZE"])))


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2"])
def test_a_step_without_a_finite_gradient_is_skipped_by_all(
    lab: Lab, unbroken: list[float], tmp_path: Path, zero: str
) -> None:
    overrides = lab.overrides(tmp_path, "parallel.ep=2", "training.steps=6", f"deepspeed={zero}")
    losses = run_world(_train_with_bad_gradients, 2, overrides, lab.cache, [3])
    assert losses[0] == losses[1] and len(losses[0]) == 5  # one step is missing
    assert losses[0][:2] == pytest.approx(unbroken[:2], rel=1e-5)
    skipped = [line for line in lines(tmp_path / "metrics.jsonl") if "skipped" in line]
    assert [line["step"] for line in skipped] == [3] and len(skipped[0]["skipped"]) == 8


def test_a_last_step_that_is_skipped_is_saved_as_such(lab: Lab, tmp_path: Path) -> None:
    overrides = lab.overrides(tmp_path, "parallel.ep=2", "training.steps=3")
    losses = run_world(_train_with_bad_gradients, 2, overrides, lab.cache, [3])
    assert len(losses[0]) == 2
    with CheckpointReader(find_checkpoint(tmp_path)) as reader:
        assert (reader.step, reader.index["optimizer_steps"]) == (3, 2)


def test_steps_that_stay_bad_stop_the_run_and_name_the_utterances(lab: Lab, tmp_path: Path) -> None:
    overrides = lab.overrides(tmp_path, "parallel.ep=2", "training.steps=6", "training.max_skipped_steps=1")
    with pytest.raises(
        RuntimeError, match=r"step 4 was skipped: .*utterances train-\d+.*2 in a row.*max_skipped_steps=1"
    ):
        run_world(_train_with_bad_gradients, 2, overrides, lab.cache, [3, 4])


def test_a_damaged_checkpoint_is_passed_over_loudly(
    lab: Lab, unbroken: list[float], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lab.train(2, tmp_path, "training.steps=6", "training.save_every=2", ep=2)
    newest = find_checkpoint(tmp_path)
    part = next(newest.glob("part-*.safetensors"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    capfd.readouterr()
    assert lab.train(2, tmp_path, "training.steps=6", "training.save_every=2", ep=2) == unbroken[4:]
    assert f"{newest.name} is damaged and passed over" in " ".join(capfd.readouterr().err.split())
    for path in (tmp_path / "checkpoints").glob("step-*"):
        shutil.rmtree(path / "config.yaml", ignore_errors=True)
        next(path.glob("part-*.safetensors")).unlink()
    with pytest.raises(RuntimeError, match="are all damaged"):
        lab.train(2, tmp_path, "training.steps=6", ep=2)
