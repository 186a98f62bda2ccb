"""Let Megatron-Core run on CPU. Does nothing when CUDA is available.

Megatron-Core 0.16 asks for the current CUDA device in a few places even where every tensor is on the CPU. This is the
only module that patches it, and each patch says which code needs it.
"""

from __future__ import annotations

from typing import Any

import torch


class _TorchOnCPU:
    """Stands for the name ``torch`` inside one Megatron module: factories that ask for "cuda" give CPU tensors."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, device=None if str(device).startswith("cuda") else device, **kwargs)


def install() -> None:
    """Apply the patches once; safe to call again."""
    if torch.cuda.is_available() or isinstance(getattr(_schedules(), "torch", None), _TorchOnCPU):
        return
    # Tensor-parallel mappings and pipeline receive buffers are allocated on the current CUDA device.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    # The pipeline synchronises the device after exchanging shapes of variable-length microbatches.
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    # The schedules count tokens in a tensor that they create on the GPU, whatever the device of all else.
    _schedules().torch = _TorchOnCPU()
    # The random-number tracker saves and restores the state of the CUDA generator.
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)


def _schedules() -> Any:
    from megatron.core.pipeline_parallel import schedules

    return schedules
