"""Experts between two maps that all experts of a layer share, ``E(h) = up(GELU(core(down(h))))``, without biases.

Down [b, H] and up [H, b] are the layer's, core [b, b] an expert's own: 2 H b + N b b numbers for N experts. Both maps
are linear, so they are computed once a token, before the experts and after their gate-weighted sum; what an expert
reads, gives and what travels to another rank are b values, not H. The router reads the hidden states.

If all cores are one, and gates add up to one, it is one dense bottleneck; with cores that are diagonal and of zeros and
ones, MoME's experts without biases, whose units are those of one bottleneck that their core chooses.
Source: MoLE (arXiv 2503.23100) for the shared projection with a small transformation of each expert. Square cores, GELU
and where it stands, as MoME has it, are this project's; the paper factorises the matrices of gated feed-forward
networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mome_dist.moe.forms.base import ExpertForm, Part

if TYPE_CHECKING:
    from torch import Tensor


class Latent(ExpertForm):
    """b b numbers, and 2 H b of the layer."""

    parts = (Part("core_weight", "bb"),)
    common = (Part("down_weight", "bH"), Part("up_weight", "Hb", "zero"))

    def width(self, hidden_size: int, bottleneck: int) -> int:
        """As `ExpertForm.width`: b."""
        return bottleneck

    def enter(self, hidden_TH: Tensor, *common: Tensor) -> Tensor:
        """As `ExpertForm.enter`: the down-projection."""
        from torch.nn import functional as F

        return F.linear(hidden_TH, common[0].to(hidden_TH.dtype))

    def leave(self, output_TD: Tensor, *common: Tensor) -> Tensor:
        """As `ExpertForm.leave`: the up-projection."""
        from torch.nn import functional as F

        return F.linear(output_TD, common[1].to(output_TD.dtype))

    def one(self, rows_NH: Tensor, *parts: Tensor) -> Tensor:
        """As `ExpertForm.one`."""
        from torch.nn import functional as F

        return F.gelu(F.linear(rows_NH, *parts))

    def dense(
        self, hidden_TH: Tensor, routed: Sequence[Tensor], gates_TE: Tensor, shared: Sequence[Tensor] | None = None
    ) -> Tensor:
        """As `ExpertForm.dense`: all cores as one product, then sums that the gates weight."""
        import torch

        cores_Xbb, gates_TX = routed[0].to(hidden_TH.dtype), gates_TE.to(hidden_TH.dtype)
        if shared is not None:
            cores_Xbb = torch.cat([cores_Xbb, shared[0].to(hidden_TH.dtype)])
            gates_TX = torch.cat([gates_TX, gates_TX.new_ones(len(gates_TX), len(shared[0]))], dim=1)
        return (self._all(hidden_TH, cores_Xbb) * gates_TX[:, :, None]).sum(dim=1)

    def summed(self, hidden_TH: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """As `ExpertForm.summed`."""
        return self._all(hidden_TH, weights[0].to(hidden_TH.dtype)).sum(dim=1)

    def kept(self, hidden_size: int, bottleneck: int) -> int:
        """As `ExpertForm.kept`: values before and after GELU."""
        return 2 * bottleneck

    def kept_of_rows(self, hidden_size: int, bottleneck: int) -> int:
        """The same in `ragged`."""
        return 2 * bottleneck

    def _all(self, hidden_TH: Tensor, cores_Xbb: Tensor) -> Tensor:
        """What each expert gives for every token, [T, X, b]."""
        from torch.nn import functional as F

        return F.gelu(F.linear(hidden_TH, cores_Xbb.flatten(0, 1))).unflatten(1, (len(cores_Xbb), -1))
