"""Experts of unequal widths: how many units each has, and what the balance loss weighs it with. No torch here.

All experts lie in tensors as wide as the widest; the units that an expert lacks are zeros that get no gradient
(`mome_dist.moe.forms.base.ExpertForm.narrows`), so that every dispatch, layout and checkpoint computes what it computes
of equal experts. What that costs are the zeros: memory and products are those of the widest.

Source: HMoE (arXiv 2408.10681) for unequal sizes in arithmetic or geometric series and a loss that favours small
experts, ``N sum_e (b_e / mean b) f_e P_e`` here, as this project recalls it; equal sizes make it the Switch loss. That
series begin at one unit and keep the mean is this project's choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RULES = ("equal", "arithmetic", "geometric")


@dataclass(frozen=True)
class Widths:
    """Units of each expert of a module.

    Attributes:
        routed: of each routed expert, at least one.
        shared: of each shared one.
        weighed: whether the balance loss weighs experts with their widths.
    """

    routed: tuple[int, ...]
    shared: int
    weighed: bool = False

    @property
    def widest(self) -> int:
        """Units of the widest expert, routed or shared: as wide are the tensors."""
        return max(*self.routed, self.shared)

    @property
    def balance_weights(self) -> tuple[float, ...] | None:
        """``b_e / mean b`` of the routed experts; None where the loss does not weigh them."""
        if not self.weighed:
            return None
        return tuple(width * len(self.routed) / sum(self.routed) for width in self.routed)

    def __str__(self) -> str:
        return f"of {min(self.routed)} to {max(self.routed)} units"


def series(rule: str, experts: int, mean: int) -> tuple[int, ...]:
    """Widths of a series that begins near one unit and has exactly ``experts * mean`` units, the narrowest first.

    Args:
        rule: "arithmetic", ``1 ... 2 mean - 1`` in equal steps; or "geometric", in equal ratios.
        experts: how many, at least two.
        mean: units of an expert in the mean.
    """
    if rule == "arithmetic":
        step = 2 * (mean - 1) / (experts - 1)
        lower = [1 + math.floor(number * step) for number in range(experts // 2)]
        return (*lower, *[mean] * (experts % 2), *(2 * mean - width for width in reversed(lower)))
    low, high = 1.0, float(experts * mean)
    for _ in range(200):
        ratio = (low + high) / 2
        too_many = sum(min(ratio**number, 1e12) for number in range(experts)) > experts * mean
        low, high = (low, ratio) if too_many else (ratio, high)
    exact = [low**number for number in range(experts)]
    widths = [max(math.floor(width), 1) for width in exact]
    most_lacking = sorted(range(experts), key=lambda number: widths[number] - exact[number])
    for number in most_lacking[: experts * mean - sum(widths)]:
        widths[number] += 1
    return tuple(widths)
