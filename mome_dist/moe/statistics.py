"""Counts of what the router did: tokens per expert, and tokens that an expert over capacity lost."""

from __future__ import annotations

import torch
from torch import Tensor


class RoutingStatistics:
    """Running counts since the last `take`, on the routing's device, without a synchronisation per layer.

    The tensor is [2, E]: routes asked for, and routes dropped, per expert.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._counts_2E: Tensor | None = None

    def add(self, asked_E: Tensor, dropped_E: Tensor) -> None:
        """Count one forward pass: int64 [E] routes asked for (padding excluded) and routes dropped."""
        counts = torch.stack([asked_E, dropped_E])
        self._counts_2E = counts if self._counts_2E is None else self._counts_2E + counts

    def take(self) -> Tensor:
        """Return the int64 counts [2, E] of this rank and start again from zero."""
        counts = self._counts_2E
        self._counts_2E = None
        return counts if counts is not None else torch.zeros(2, self.num_experts, dtype=torch.int64)
