"""The layers of training in graphs: they train what one process trains, and give the bits of the same layers outside.

On a CPU the graphs are rehearsed (`mome_dist.cuda_graphs.rehearsal`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mome_dist.cuda_graphs.replay import Function
from mome_dist.llm.attention import CausalAttention
from mome_dist.llm.graphed_stack import GraphedStack
from mome_dist.parallel.initialize import parallel_world
from mome_dist.token_context import FixedTokens, TokenContext
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
TOLERANCE = {"cpu": {"fp32": 0.0, "bf16": 0.0}, "cuda": {"fp32": 1e-5, "bf16": 2e-2}}


def graphed(probe: Probe, device: torch.device, tokens: int = TOKENS, precision: str = "fp32") -> Probe:
    """The probe with the layers in graphs."""
    config = dataclasses.replace(probe.config)
    config.llm = dataclasses.replace(config.llm, graphs=KIND[device.type], precision=precision)
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_gives_what_its_layers_give(device: torch.device, probe: Probe, precision: str, record: Record) -> None:
    found = run_alone(device, _gradients, graphed(probe, device, precision=precision), device)
    errors = {
        name: float(np.abs(value - expected[name]).max() / np.abs(expected[name]).max())
        for mine, expected in zip(found["graph"], found["layers"], strict=True)
        for name, value in mine.items()
    }
    record(**{f"graphs_{precision}": found["graph captured"], f"worst_{precision}": max(errors.values())})
    assert found["graph replayed"] == found["layers replayed"] == 4
    assert found["graph captured"] < 4, "nothing is replayed"
    assert len(errors) > 8 and max(errors.values()) <= TOLERANCE[device.type][precision], errors


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


def _attended(device: torch.device, kernel: str) -> list[list[np.ndarray]]:
    """Outputs and gradients of attention that knows lengths and of attention that does not; and what the latter makes
    of a change in the second of three sequences, behind which dead tokens are."""
    dtype = torch.bfloat16 if (device.type, kernel) == ("cuda", "sdpa") else torch.float32  # the flash kernel
    context = TokenContext.of([("a", [3, 5]), ("b", [4])], least=19).to(device)
    starts_B1 = torch.nn.functional.pad(context.starts_B1, (0, 3), value=context.tokens)
    alive_N, positions_N = context.positions_N >= 0, context.positions_N
    fixed = FixedTokens(context.members_VN, context.modality_N, alive_N, positions_N, starts_B1, longest=32)
    attention = CausalAttention(kernel, 64)
    qkv_NGXd = torch.randn(context.tokens, 2, 4, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found = []
    for tokens in (context, fixed):
        given = qkv_NGXd.clone().requires_grad_()
        output_NZ = attention(given, tokens)[: context.alive]
        output_NZ.float().square().sum().backward()
        assert given.grad is not None
        found.append([each.detach().float().cpu().numpy() for each in (output_NZ, given.grad)])
    changed = qkv_NGXd.clone()
    changed[3:8] += 1
    difference = (attention(changed, fixed) - attention(qkv_NGXd, fixed)).float().cpu()
    return [*found, [each.numpy() for each in difference.split([3, 5, 4, 12])]]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_without_lengths_is_that_with_them(device: torch.device, kernel: str) -> None:
    expected, found, difference = run_alone(device, _attended, device, kernel)
    tolerance = 2e-2 if (device.type, kernel) == ("cuda", "sdpa") else 1e-5  # bf16 has 8 bits
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=tolerance * float(np.abs(theirs).max()), rtol=0)
    assert [bool(each.any()) for each in difference] == [False, True, False, False]
