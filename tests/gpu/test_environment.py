"""What the device is, what it can do at most, and whether fp32 and bf16 are what the other checks take them for."""

from __future__ import annotations

import platform

import pytest
import torch

from mome_dist.cluster.rates import measure_rates
from mome_dist.llm.precision import fast_precision
from mome_dist.versions import version_of
from tests.gpu.conftest import Record

pytestmark = pytest.mark.gpu

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "megatron-core", "numpy")
SIDE = 128  # of the square matrices whose product is timed on a CPU


def test_the_device_says_what_it_is(device: torch.device, record: Record) -> None:
    record(
        python=platform.python_version(),
        versions={name: version_of(name) for name in PACKAGES},
        device=device.type,
        precision=fast_precision(),
    )
    if device.type == "cpu":
        return
    found = torch.cuda.get_device_properties(device)
    record(
        name=found.name,
        gpus=torch.cuda.device_count(),
        capability=f"{found.major}.{found.minor}",
        multiprocessors=found.multi_processor_count,
        memory_bytes=found.total_memory,
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())),
    )
    assert fast_precision() == "bf16", "this GPU does not multiply bf16 in hardware"


def test_ceilings_of_products_and_copies(device: torch.device, record: Record) -> None:
    rates = measure_rates(device, SIDE if device.type == "cpu" else None).record()
    record(**rates)
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_products_round_as_their_type_says(device: torch.device, dtype: torch.dtype) -> None:
    """fp32 is not TF32, whose inputs have 10 bits, and bf16 adds up in fp32."""
    generator, inner = torch.Generator().manual_seed(0), 512
    left, right = (torch.randn(inner, inner, generator=generator).to(dtype) for _ in range(2))
    expected = left.double() @ right.double()
    found = (left.to(device) @ right.to(device)).cpu().double()
    error = float((found - expected).norm() / expected.norm())
    # A sum of 512 products in fp32 is off by sqrt(512) roundings of 6e-8, 1.4e-6, at most; in TF32 by 3e-4. In bf16 the
    # result is rounded once, by at most 2**-8; sums in bf16 would be off by ten times as much.
    assert error < {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
