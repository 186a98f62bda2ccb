"""A checkpoint of a run on the device comes back bit for bit, and training continues with the same bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mome_dist.checkpoint.format import CheckpointReader, find_checkpoint
from mome_dist.checkpoint.restore import restore_optimizer, restore_random_state, restore_weights
from mome_dist.checkpoint.save import CheckpointSaver
from mome_dist.parallel.initialize import parallel_world
from mome_dist.training.run_directory import owned_run
from mome_dist.verification.probe import Probe
from tests.gpu.training import ONE, Arrays, Trainee, different
from tests.gpu.worlds import run_alone

pytestmark = pytest.mark.gpu

BEFORE, AFTER = 2, 2  # steps


def _saved(probe: Probe, device: torch.device, zero: int) -> tuple[Arrays, list[float], Arrays, list[float]]:
    """The state that was saved, losses after it, the last state, and numbers drawn on the device after the save."""
    with parallel_world(ONE, probe.config.seed, 60), owned_run(probe.config) as ownership:
        trainee = Trainee(probe, device, "local")
        trainee.start(zero)
        for number in range(BEFORE):
            trainee.step(number)
        saver = CheckpointSaver(probe.config, ONE, {"llm": "0" * 64}, {}, lambda step: step, ownership)
        saver.save(BEFORE, trainee.model, trainee.engine)
        state, drawn = trainee.state(), torch.rand(4, device=device).tolist()
        losses = [trainee.step(BEFORE + more) for more in range(AFTER)]
        return state, losses, trainee.state(), drawn


def _restored(probe: Probe, device: torch.device, zero: int) -> tuple[Arrays, list[float], Arrays, list[float]]:
    checkpoint = find_checkpoint(Path(probe.config.output_dir))
    with CheckpointReader(checkpoint) as reader:
        reader.verify()
    with parallel_world(ONE, probe.config.seed, 60):
        trainee = Trainee(probe, device, "local")
        assert restore_weights(checkpoint, trainee.model) == BEFORE
        trainee.start(zero)
        restore_optimizer(checkpoint, trainee.model, trainee.engine)
        restore_random_state(checkpoint, ONE)
        state, drawn = trainee.state(), torch.rand(4, device=device).tolist()
        losses = [trainee.step(BEFORE + more) for more in range(AFTER)]
        return state, losses, trainee.state(), drawn


@pytest.mark.parametrize("zero", [0, 2])
def test_a_run_continues_with_the_same_bits(device: torch.device, probe: Probe, zero: int, tmp_path: Path) -> None:
    run = dataclasses.replace(probe, config=dataclasses.replace(probe.config, output_dir=str(tmp_path)))
    saved, losses, end, drawn = run_alone(device, _saved, run, device, zero)
    restored, same_losses, same_end, same_drawn = run_alone(device, _restored, run, device, zero)
    assert different(restored, saved) == [] and same_drawn == drawn
    assert same_losses == losses and different(same_end, end) == []
    assert different(end, saved) == list(saved), "nothing was trained after the save"
