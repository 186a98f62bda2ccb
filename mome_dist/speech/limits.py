"""Where the text of a clip ends at the latest, whatever its neighbours in the batch do."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import StoppingCriteria


class ClipLimits(StoppingCriteria):
    """Ends the text of each clip at its own number of tokens.

    `generate` asks about rows of new tokens, of one clip after the other: one row a clip in greedy search, several in
    beam search.
    """

    def __init__(self, limits_B: Tensor) -> None:
        self._limits_B = limits_B

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        rows, length = input_ids.shape
        return (self._limits_B <= length).repeat_interleave(rows // len(self._limits_B))
