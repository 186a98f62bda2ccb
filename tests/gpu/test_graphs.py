"""The layers of training in graphs: they train what one process trains, and give the bits of the same layers outside.

On a CPU the graphs are rehearsed (`mome_dist.graphs.rehearsal`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mome_dist.graphs.replay import Function
from mome_dist.llm.graphed_stack import GraphedStack
from mome_dist.parallel.initialize import parallel_world
from mome_dist.verification.probe import Probe
from mome_dist.verification.run import Case
from tests.gpu.conftest import Record
from tests.gpu.training import ONE, Trainee
from tests.gpu.worlds import assert_equal, compare_layouts, run_alone

pytestmark = pytest.mark.gpu

KIND = {"cpu": "rehearsal", "cuda": "cuda"}
TOKENS = 512  # more than any microbatch of the probe has
CASES = [Case(f"ZeRO {zero}", ONE, zero=zero, dispatch="local") for zero in (0, 1)]
# A graph does the same operations, but torch may choose others of the GPU's kernels for it.
TOLERANCE = {"cpu": 0.0, "cuda": 1e-5}


def graphed(probe: Probe, device: torch.device, tokens: int = TOKENS) -> Probe:
    """The probe with the layers in graphs."""
    config = dataclasses.replace(probe.config)
    config.llm = dataclasses.replace(config.llm, graphs=KIND[device.type])
    config.data = dataclasses.replace(config.data, microbatch_tokens=tokens)
    return dataclasses.replace(probe, config=config)


def test_training_in_graphs_is_that_of_one_process(device: torch.device, probe: Probe, record: Record) -> None:
    comparisons = compare_layouts(device, graphed(probe, device), CASES, "adamw")
    record(errors={name: each.errors for name, each in comparisons.items()})
    assert_equal(comparisons)


def _uncaptured(function: Function, samples: tuple[torch.Tensor, ...]) -> Function:
    """The same layers on the same fixed shapes, without a graph."""
    return function


def _gradients(probe: Probe, device: torch.device) -> dict[str, Any]:
    """Gradients of two steps of two microbatches each, with graphs and without."""
    found: dict[str, Any] = {}
    with parallel_world(ONE, probe.config.seed, timeout_seconds=60):
        for name in ("graph", "layers"):
            trainee = Trainee(probe, device, "local")
            llm = trainee.model.parts()[0].llm
            if name == "layers":
                llm.capture_layers(_uncaptured, TOKENS)
            trainee.start(zero=0)
            found[name] = [trainee.gradients(number) for number in (0, 1)]
            stack = llm.graphed
            assert isinstance(stack, GraphedStack)
            found[f"{name} captured"], found[f"{name} replayed"] = stack.captured, stack.replayed
    return found


def test_a_graph_gives_what_its_layers_give(device: torch.device, probe: Probe, record: Record) -> None:
    found = run_alone(device, _gradients, graphed(probe, device), device)
    errors = {
        name: float(np.abs(value - expected[name]).max() / np.abs(expected[name]).max())
        for mine, expected in zip(found["graph"], found["layers"], strict=True)
        for name, value in mine.items()
    }
    record(captured=found["graph captured"], replayed=found["graph replayed"], worst_of_graph=max(errors.values()))
    assert found["graph replayed"] == found["layers replayed"] == 4
    assert found["graph captured"] < 4, "nothing is replayed"
    assert len(errors) > 8 and max(errors.values()) <= TOLERANCE[device.type], errors


def _with_fewer_tokens(probe: Probe, device: torch.device) -> tuple[list[int], int]:
    """Tokens of the microbatches of a step, and how many of them were replayed."""
    with parallel_world(ONE, probe.config.seed, timeout_seconds=60):
        trainee = Trainee(probe, device, "local")
        trainee.start(zero=0)
        trainee.gradients(0)
        step = trainee.probe.step(0, 0, ONE)
        stack = trainee.model.parts()[0].llm.graphed
        assert stack is not None
        return [each.tokens.context.tokens for each in step.microbatches], stack.replayed


def test_what_has_more_tokens_is_run_layer_by_layer(device: torch.device, probe: Probe) -> None:
    sizes = [each.tokens.context.tokens for each in probe.step(0, 0, ONE).microbatches]
    assert len(set(sizes)) == 2
    found, replayed = run_alone(device, _with_fewer_tokens, graphed(probe, device, min(sizes)), device)
    assert found == sizes and replayed == 1
