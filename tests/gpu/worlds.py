"""Worlds of ranks on the device of the checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  DeepSpeed does when it makes an engine
import torch

from mome_dist.parallel.backend import BACKEND, GLOO
from mome_dist.parallel.forked import run_forked, run_spawned
from mome_dist.ports import free_port
from mome_dist.verification.compare import Comparison, compare
from mome_dist.verification.probe import Probe
from mome_dist.verification.run import Case, Outcome, merged, run_case, run_reference

TIMEOUT_SECONDS = 120.0  # on a GPU, `tools/gpu_suite.py` has a shorter limit for each check


def run_alone(device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
    """What ``function(*args)`` returns in a world of its own: on a CPU in a fork, for this process must stay without
    process groups; on a GPU here, for a fork cannot use it. It returns no torch tensors."""
    return run_forked(function, 1, *args)[0] if device.type == "cpu" else function(*args)


def run_ranks(device: torch.device, function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of ``world`` ranks; on GPUs they are new processes."""
    run = run_forked if device.type == "cpu" else run_spawned
    return run(function, world, *args, timeout=TIMEOUT_SECONDS)


def compare_layouts(
    device: torch.device, probe: Probe, cases: Sequence[Case], optimizer: str, backend: str = GLOO
) -> dict[str, Comparison]:
    """Train every case, all of one world size, one after the other in one world of processes, and compare each with one
    process on the CPU.

    Args:
        backend: of the collectives on GPUs.
    """
    sizes = {case.layout.world_size for case in cases}
    assert len(sizes) == 1, "cases of several world sizes"
    world, ports = sizes.pop(), [free_port() for _ in cases]
    if world == 1:
        ranks = [run_alone(device, _outcomes, probe, cases, optimizer, ports, backend)]
    else:
        ranks = run_ranks(device, _outcomes, world, probe, cases, optimizer, ports, backend)
    reference = run_alone(device, run_reference, probe, cases[0], optimizer)
    return {
        case.name: compare(merged(list(parts)), reference)
        for case, parts in zip(cases, zip(*ranks, strict=True), strict=True)
    }


def assert_equal(comparisons: dict[str, Comparison]) -> None:
    """Every case trained what one process trained."""
    assert comparisons
    for name, comparison in comparisons.items():
        assert not comparison.mismatches, (name, comparison.mismatches[:3])


def _outcomes(probe: Probe, cases: Sequence[Case], optimizer: str, ports: Sequence[int], backend: str) -> list[Outcome]:
    """This rank's outcome of every case; each world meets at a port of its own."""
    outcomes = []
    for case, port in zip(cases, ports, strict=True):
        if case.layout.world_size > 1:
            os.environ |= {"MASTER_PORT": str(port), BACKEND: backend if torch.cuda.is_available() else GLOO}
        outcomes.append(run_case(probe, case, optimizer, None))
    return outcomes
