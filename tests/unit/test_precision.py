"""Which precision suits a device, and a plan for it."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch

from mome_dist.config import load_config
from mome_dist.llm.precision import fast_precision
from mome_dist.model.shared import llm_dtype
from mome_dist.planning.command import job_of_options
from mome_dist.planning.hardware import cluster_of_gpus


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"architecture": "aarch64", "bf16": True}, "bf16"),
        ({"architecture": "aarch64", "bf16": False}, "fp32"),
    ],
)
def test_a_cpu_is_given_what_it_multiplies_in_hardware(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fast_precision() == expected
    config = load_config(["llm=smollm2_135m", "llm.precision=auto"])
    assert llm_dtype(config) == {"bf16": torch.bfloat16, "fp32": torch.float32}[expected]


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_comes_before_the_cpu(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: native or including_emulation)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not native})
    assert fast_precision() == expected


@pytest.mark.parametrize(("bf16_flops", "expected"), [(30e9, "fp32"), (230e9, "bf16")])
def test_a_plan_is_for_the_faster_of_the_measured_rates(bf16_flops: float, expected: str) -> None:
    cluster = replace(cluster_of_gpus("h100", 1, 2), on_gpu=False, bf16_flops=bf16_flops, fp32_flops=110e9)
    options = argparse.Namespace(seconds=6, text_tokens=20, prompt_tokens=8, llm="llama-3.2-1b")
    config = load_config(["llm=smollm2_135m", "llm.precision=auto"])
    assert job_of_options(options, config, cluster).precision == expected
    assert job_of_options(options, load_config(["llm.precision=bf16"]), cluster).precision == "bf16"
