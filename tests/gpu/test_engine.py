"""The engine on the device against torch's optimiser in one process on the CPU: losses, norms, gradients, weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mome_dist.parallel.layout import Layout
from mome_dist.verification.probe import Probe
from mome_dist.verification.run import Case
from tests.gpu.conftest import Record
from tests.gpu.worlds import assert_equal, compare_layouts

pytestmark = pytest.mark.gpu

STEPS = 5
CASES = [
    Case("ZeRO 0", Layout.for_world(1), zero=0, dispatch="local"),
    Case("ZeRO 1", Layout.for_world(1), zero=1, dispatch="alltoall"),
    Case("ZeRO 2", Layout.for_world(1), zero=2, dispatch="local"),
]


def test_five_steps_equal_those_of_the_cpu(device: torch.device, probe: Probe, record: Record) -> None:
    comparisons = compare_layouts(device, dataclasses.replace(probe, steps=STEPS), CASES, "adamw")
    record(errors={name: each.errors for name, each in comparisons.items()})
    assert_equal(comparisons)
