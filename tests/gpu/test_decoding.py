"""Decoding on the device writes the tokens that the CPU writes, in fp32: greedily and with beams."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mome_dist.model.shared import build_reference
from mome_dist.verification.probe import TAGS, Probe, wake_reference
from tests import tiny_llms
from tests.gpu.conftest import Record
from tests.gpu.worlds import run_alone

pytestmark = pytest.mark.gpu

CLIPS = range(6)
LIMIT = {"cpu": 8, "cuda": 24}  # tokens
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"num_hidden_layers": 2},
    "cuda": {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "head_dim": 64},
}


@pytest.fixture(scope="module")
def speaking(device: torch.device, probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """The probe with an LLM that suits the device."""
    llm = tiny_llms.save(tiny_llms.llama3(**SIZES[device.type]), tmp_path_factory.mktemp("llm"))
    config = dataclasses.replace(probe.config)
    config.llm = dataclasses.replace(config.llm, path=str(llm), precision="fp32")
    return dataclasses.replace(probe, config=config)


def _written(probe: Probe, device: torch.device, beams: int, limit: int) -> list[list[int]]:
    """Tokens of every clip in every view."""
    probe = dataclasses.replace(probe, device=device)
    model = build_reference(probe.config, probe.widths).eval()
    wake_reference(model, probe.config.seed)
    model.llm.to(device)
    model.to(device)
    written: list[list[int]] = []
    for view in probe.views:
        examples = [probe.example(number, view) for number in CLIPS]
        features = probe.microbatch(CLIPS).features
        written += model.generate(
            [each.ids[: each.prefix_length] for each in examples],
            view,
            features["audio"],
            features["video"],
            eos=int(str(TAGS["eos"])),
            limits=[limit - number % 2 for number in CLIPS],
            num_beams=beams,
        )
    return written


@pytest.mark.parametrize("beams", [1, 5])
def test_the_device_writes_what_the_cpu_writes(
    device: torch.device, speaking: Probe, beams: int, record: Record
) -> None:
    limit = LIMIT[device.type]
    expected = run_alone(device, _written, speaking, torch.device("cpu"), beams, limit)
    found = run_alone(device, _written, speaking, device, beams, limit)
    record(**{f"tokens_with_{beams}_beams": sum(map(len, found))})
    assert found == expected
    assert len({tuple(ids) for ids in found}) > len(CLIPS), "clips write alike: the check cannot tell them apart"
