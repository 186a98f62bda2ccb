"""The frozen LLM under Megatron-Core on the device gives Hugging Face's logits, through the fused kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mome_dist.llm.hugging_face import load_hugging_face
from mome_dist.llm.megatron import FrozenLLM, build_frozen_llm
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.weights import load_weights
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from tests import tiny_llms
from tests.gpu.conftest import Record
from tests.gpu.worlds import run_alone
from tests.packed import pack_rows, unpack_rows

pytestmark = pytest.mark.gpu

LENGTH = 64
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cuda": {
        "vocab_size": 1024,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "head_dim": 128,
    },
}
# Of the largest logit. A layer rounds some dozen times, by 6e-8 of values that its norm keeps at one size, and adds up
# to 2816 products: as random walks over eight layers, 1e-5. What differs by a constant of the scaling is off by 1e-1.
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def directory(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llms.save(tiny_llms.llama3(**SIZES[device.type]), tmp_path_factory.mktemp("llm"))


def _ids_BS(directory: Path) -> torch.Tensor:
    vocabulary = LLMShape.from_directory(directory).vocabulary
    return torch.randint(vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _hugging_face(directory: Path, device: torch.device) -> np.ndarray:
    model = load_hugging_face(directory, torch.float32).to(device)
    model.set_attn_implementation("eager")
    return model(input_ids=_ids_BS(directory).to(device)).logits.cpu().numpy()


def _megatron(directory: Path, device: torch.device, kernel: str, dtype: torch.dtype) -> FrozenLLM:
    shape = LLMShape.from_directory(directory)
    llm = build_frozen_llm(shape, dtype, kernel, device, Layout.for_world(1)).eval()
    load_weights(llm, shape, directory)
    return llm


@torch.no_grad()
def _logits(directory: Path, device: torch.device, kernel: str) -> np.ndarray:
    with parallel_world(Layout.for_world(1), 0, timeout_seconds=60):
        ids_BS = _ids_BS(directory).to(device)
        llm = _megatron(directory, device, kernel, torch.float32)
        ids_N, context = pack_rows(ids_BS)
        return unpack_rows(llm.logits(llm.embed(ids_N), context), ids_BS).cpu().numpy()


def _kernels(directory: Path, device: torch.device) -> list[str]:
    """Names of what ran in a forward and backward pass as training does it: kernels on a GPU, operations on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with parallel_world(Layout.for_world(1), 0, timeout_seconds=60):
        ids_BS = _ids_BS(directory).to(device)
        llm = _megatron(directory, device, "sdpa", dtype)
        ids_N, context = pack_rows(ids_BS)
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            embedded_NH = llm.embed(ids_N).requires_grad_()
            llm.logits(embedded_NH, context).float().square().mean().backward()
        on_gpu = torch.autograd.DeviceType.CUDA
        return sorted(
            {event.name for event in profiler.events() or () if device.type == "cpu" or event.device_type == on_gpu}
        )


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_logits_equal_hugging_face(directory: Path, device: torch.device, kernel: str, record: Record) -> None:
    expected = run_alone(device, _hugging_face, directory, torch.device("cpu"))
    found = {
        "megatron": run_alone(device, _logits, directory, device, kernel),
        "hugging face": run_alone(device, _hugging_face, directory, device),
    }
    errors = {name: float(np.abs(each - expected).max() / np.abs(expected).max()) for name, each in found.items()}
    record(**{f"logit_errors_{kernel}": errors})
    assert max(errors.values()) < TOLERANCE, errors


def test_attention_runs_in_the_flash_kernel(directory: Path, device: torch.device, record: Record) -> None:
    kernels = run_alone(device, _kernels, directory, device)
    flash = [name for name in kernels if "flash" in name.lower()]
    record(flash_kernels=flash)
    assert len(flash) >= 2, f"forward and backward, of {kernels}"
