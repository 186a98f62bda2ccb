"""The precision of frozen weights: what suits a device, and what the names stand for."""

from __future__ import annotations

import torch

# Of `torch.cpu.get_capabilities`: products of bf16 on x86-64 (vectors, tiles) and on ARM.
_BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")


def dtype_of(precision: str) -> torch.dtype:
    """The type of frozen weights for "bf16" or "fp32"; "auto" is this process's own (`mome_dist.training.precision`
    asks all)."""
    precision = fast_precision() if precision == "auto" else precision
    return torch.bfloat16 if precision == "bf16" else torch.float32


def fast_precision() -> str:
    """ "bf16" where this process's device (its GPU, else the CPU) multiplies bf16 in hardware, else "fp32".

    Without such hardware bf16 products are emulated, which takes several times as long as fp32 ones do.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if cpu_multiplies_bf16() else "fp32"


def cpu_multiplies_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 in hardware."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name, False) for name in _BF16_PRODUCTS)
