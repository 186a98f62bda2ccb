"""NVIDIA's Apex, where it can be used: fused kernels for AdamW and for the norms of the frozen LLM.

Apex is built from source (github.com/NVIDIA/apex, with ``--cpp_ext --cuda_ext``) and never required. The public package
index has an unrelated package of the same name, so NVIDIA's is known by its compiled extensions, which nothing else
has. These need CUDA: elsewhere PyTorch's own forms are used, which compute the same.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_FUSED_ADAM = ("amp_C", "apex.optimizers", "FusedAdam")
_FUSED_RMS_NORM = ("fused_layer_norm_cuda", "apex.normalization", "FusedRMSNorm")


def runs_on(device: torch.device) -> bool:
    """Whether Apex has kernels for a device."""
    return device.type == "cuda"


def fused_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """Apex's ``FusedAdam``, or None where it cannot be imported.

    With ``adam_w_mode`` it takes the step of `torch.optim.AdamW`, and names the moments likewise (``exp_avg``,
    ``exp_avg_sq``). It counts its steps by parameter group (``group["step"]``, an int) instead of by parameter, and its
    ``zero_grad`` takes no argument.
    """
    found: Callable[..., torch.optim.Optimizer] | None = _find(*_FUSED_ADAM)[0]
    return found


def fused_rms_norm() -> Callable[..., nn.Module] | None:
    """Apex's ``FusedRMSNorm``, or None where it cannot be imported.

    Its statistics are in fp32 and ``eps`` is added to the mean square; the result has the input's type.
    """
    found: Callable[..., nn.Module] | None = _find(*_FUSED_RMS_NORM)[0]
    return found


def is_fused_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser is Apex's."""
    fused = _find(*_FUSED_ADAM)[0]
    return fused is not None and isinstance(optimizer, fused)


def describe(device: torch.device) -> str:
    """One line that says whose AdamW and norms a run on this device has, and why."""
    if not runs_on(device):
        return "AdamW and norms: PyTorch's (NVIDIA's Apex has kernels for CUDA only)"
    told = []
    for what, place in (("AdamW", _FUSED_ADAM), ("norms", _FUSED_RMS_NORM)):
        found, problem = _find(*place)
        told.append(f"{what}: {f'{place[2]} of NVIDIA Apex' if found else f'PyTorch ({problem})'}")
    return "; ".join(told)


@functools.cache
def _find(extension: str, module: str, name: str) -> tuple[Any, str]:
    """A class of Apex, or None and why there is none."""
    # Asked first: it runs no code of whatever else is called apex.
    if importlib.util.find_spec(extension) is None:
        return None, f"NVIDIA's Apex with {extension} is not installed"
    try:
        importlib.import_module(extension)
        return getattr(importlib.import_module(module), name), ""
    except (ImportError, AttributeError) as error:
        return None, f"NVIDIA's Apex cannot be imported: {error}"
