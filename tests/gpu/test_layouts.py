"""Worlds of 2 and 4 ranks that share the device over gloo train what one process on the CPU trains."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mome_dist.config.schema import LLMLoRAConfig
from mome_dist.verification.cases import standard_cases
from mome_dist.verification.probe import Probe
from mome_dist.verification.run import Case
from tests.gpu.conftest import Record
from tests.gpu.worlds import assert_equal, compare_layouts

pytestmark = pytest.mark.gpu

BY_WORLD = {
    2: ("dp2 zero1", "ep2", "ep2 gather", "tp2", "tp2 sp", "pp2", "pp2 interleaved"),
    4: ("dp4 ep2 gather", "ep4 zero2", "tp2 pp2", "tp2 ep2 sp", "pp2 ep2 interleaved"),
}
ON_A_CPU = {2: ("ep2 gather", "pp2 interleaved"), 4: ("tp2 ep2 sp",)}  # where tests/parallel has all of them


def named(*names: str) -> list[Case]:
    """Cases of the standard list by name."""
    cases = {case.name: case for case in standard_cases()}
    return [cases[name] for name in names]


@pytest.mark.parametrize("world", BY_WORLD)
def test_ranks_that_share_the_device(device: torch.device, probe: Probe, world: int, record: Record) -> None:
    names = (ON_A_CPU if device.type == "cpu" else BY_WORLD)[world]
    comparisons = compare_layouts(device, probe, named(*names), "adamw")
    record(**{f"errors_of_{world}_ranks": {name: each.errors for name, each in comparisons.items()}})
    assert_equal(comparisons)


def test_low_rank_terms_on_the_device(device: torch.device, probe: Probe, record: Record) -> None:
    config = dataclasses.replace(probe.config)
    config.llm = dataclasses.replace(config.llm, lora=LLMLoRAConfig(rank=4, scale=0.5, terms=["shared", "rates"]))
    names = ("tp2 sp",) if device.type == "cpu" else ("tp2", "tp2 sp")
    comparisons = compare_layouts(device, dataclasses.replace(probe, config=config), named(*names), "adamw")
    record(errors_of_low_rank_terms={name: each.errors for name, each in comparisons.items()})
    assert_equal(comparisons)
