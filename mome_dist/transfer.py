"""Copies from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent_to(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on a device, without waiting for it.

    A GPU copies beside the host only from memory that cannot be paged out; from other memory, large copies wait until
    all that the GPU was asked for before is done.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
