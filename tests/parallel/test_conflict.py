"""Cosines between the gradients of views: those of one process in every layout, and training knows nothing of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mome_dist.checkpoint.format import CheckpointReader, newest_checkpoint
from mome_dist.config import load_config
from mome_dist.config.values import check_values
from mome_dist.engine.engine import Engine
from mome_dist.errors import UserError
from mome_dist.model.build import build_distributed
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.training.conflict import view_cosines
from mome_dist.verification.probe import Probe, shrunk, wake
from mome_dist.verification.run import Case, configured, optimizer_of, run_reference
from tests.parallel.runs import Lab, lines
from tests.parallel.worlds import run_world

pytestmark = pytest.mark.parallel

PROBE = ["experiment=tiny", "llm.precision=fp32", "parallel=single", "task=avsr", "mome.balance_loss=0.1"]
SP: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
CASES = [
    Case("pp2", Layout.for_world(2, pp=2), 0, "local"),
    Case("tp2 ep2 sp", Layout.for_world(4, ep=2, **SP), 2, "alltoall"),
]


def _probes(folder: Path, case: Case) -> list[Probe]:
    """The same model and clips in one view each."""
    config = shrunk(load_config(PROBE), folder)
    views: list[dict[str, Any]] = [
        {"avsr_audio_rates": [audio], "avsr_video_rates": [video]} for audio, video in ((4, 2), (16, 2), (16, 5))
    ]
    tasks = [dataclasses.replace(config.task, **each) for each in views]
    return [configured(Probe(dataclasses.replace(config, task=task), steps=1), case) for task in tasks]


def _measured(probes: list[Probe], case: Case) -> list[Any]:
    config, layout = probes[0].config, case.layout
    with parallel_world(layout, config.seed, 60) as at:
        model = build_distributed(config, layout, probes[0].widths, case.dispatch, torch.device("cpu")).train()
        wake(model.trained_parts(), config.seed)
        engine = Engine(model, optimizer_of(probes[0], "sgd"), case.settings, layout.sequence_parallel)
        cosines = view_cosines(model, engine, (probe.step(0, at.dp, layout) for probe in probes))
        assert not any(chunk.statistics.take() for chunk in model.parts()), "counted nowhere"
    return cosines.tolist()


def _cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    one, other = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layouts_find_the_cosines_of_one_process(tmp_path: Path, case: Case) -> None:
    probes = _probes(tmp_path, case)
    ranks = run_world(_measured, case.layout.world_size, probes, case)
    gradients = [run_reference(probe, case, "sgd").gradients for probe in probes]
    found_QLX = np.array(ranks[0])
    for other in ranks[1:]:
        np.testing.assert_allclose(other, found_QLX, rtol=1e-5, atol=1e-6)
    for q, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
        for layer in range(found_QLX.shape[1]):
            names = [name for name in gradients[0] if name.startswith(f"mome.{layer}.routed.")]
            for expert in range(found_QLX.shape[2] - 1):
                own = [np.concatenate([each[name][expert].ravel() for name in names]) for each in gradients]
                assert found_QLX[q, layer, expert] == pytest.approx(_cosine(own[a], own[b]), abs=2e-4)
            routers = [each[f"mome.{layer}.router_weight"] for each in gradients]
            assert found_QLX[q, layer, -1] == pytest.approx(_cosine(routers[a], routers[b]), abs=2e-4)
    assert np.nanmin(found_QLX) < 0.9, "views differ"


def _saved(run: Path) -> dict[str, NDArray[Any]]:
    """What training leaves, but the state of Python's own generator, which each process has of its own."""
    newest = newest_checkpoint(run)
    assert newest is not None
    with CheckpointReader(newest) as reader:
        names = [name for name in reader.names() if not name.endswith("/python")]
        return {name: np.asarray(reader.read(name)) for name in names}


def test_training_is_the_same_to_the_bit(lab: Lab, tmp_path: Path) -> None:
    run = ["task=avsr", "task.views_per_step=4", "mome.bias_rate=0.01", "training.steps=4"]
    losses = {
        every: lab.train(2, tmp_path / str(every), *run, f"mome.conflict_every={every}", ep=2) for every in (0, 2)
    }
    assert losses[0] == losses[2]
    without, compared = _saved(tmp_path / "0"), _saved(tmp_path / "2")
    assert without.keys() == compared.keys() and any(name.startswith("optimizer/") for name in without)
    assert not [name for name, values in without.items() if not np.array_equal(values, compared[name])]
    assert not (tmp_path / "0/conflicts.jsonl").exists()
    first, second = lines(tmp_path / "2/conflicts.jsonl")
    assert (first["step"], second["step"]) == (2, 4) and len(first["views"]) == 4 and len(first["pairs"]) == 6
    assert np.shape(first["router"]) == (6, 4) and np.shape(first["experts"]) == (6, 4, 8)


def test_one_view_a_step_has_nothing_to_compare() -> None:
    with pytest.raises(UserError, match=r"mome\.conflict_every=5 compares the views of a step"):
        check_values(load_config(["experiment=tiny", "mome.conflict_every=5", "task.views_per_step=1"]))
