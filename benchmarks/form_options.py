"""The options of `benchmarks.forms`, for its command and for its ranks."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from mome_dist.moe.widths import Widths, series

OURS = "bottleneck"


class Experts(NamedTuple):
    """Experts of a layer that is measured.

    Attributes:
        form: their name in the registry.
        experts, top_k, bottleneck: Nr, K, b for 23 experts of 12 units, of which a token uses 4; as in `configs/mome`.
        rule: of their widths.
    """

    form: str
    experts: int = 23
    top_k: int = 4
    bottleneck: int = 12
    rule: str = "equal"

    def widths(self, experts: int) -> Widths | None:
        """Units of each, where they differ."""
        if self.rule == "equal":
            return None
        return Widths(series(self.rule, experts, self.bottleneck), self.bottleneck, weighed=True)


CASES = {
    OURS: Experts("bottleneck"),
    "gated": Experts("gated", bottleneck=8),
    "linear": Experts("linear"),
    "latent": Experts("latent", bottleneck=48),
    "unequal": Experts("bottleneck", rule="arithmetic"),
    "rank_one": Experts("linear", experts=276, top_k=48, bottleneck=1),
}


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is measured."""
    parser.add_argument("--tokens", type=int, default=704, help="of each process")
    parser.add_argument("--hidden", type=int, default=2048, help="size of the hidden states")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the hidden states")
    parser.add_argument("--forms", nargs="+", choices=CASES, default=[*CASES], help=f"beside {OURS}")
    parser.add_argument("--rounds", type=int, default=21, help="turns of every form; the median counts")
    parser.add_argument("--warm-up", type=int, default=2, help="turns before them that do not count")
