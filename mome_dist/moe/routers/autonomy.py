"""No router: an expert is chosen by how strongly it answers.

``P = softmax over experts of sqrt(||A_e h||^2 + eps)`` with the expert's own down-projection A_e [b, H], without its
bias, which would answer to nothing at all; then the K best, with gates as they are unless `mome.renormalize` is set.
The task trains the choice through the experts themselves. No parameter of its own, E H fewer a layer than MoME's router
has.

Every rank needs the down-projections of all experts before it knows where tokens go: `mome.dispatch=local` has them.
There every expert works on every token anyway; its down-projections are computed twice here, in fp32 for the choice.

Source: Autonomy of Experts (arXiv 2501.13074): norm, softmax and K best without division by their sum as in the
released code, where experts have a low-rank first factor for it. That a bottleneck's down-projection is that factor is
this project's, and so is eps.
Shape suffixes: as in `mome_dist.moe.routers.base`; b width of an expert, N = E b.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.routers.base import ReadableExperts, RoutedTokens, Router

EPSILON = 1e-12  # the norm of zero has no gradient


class AutonomyRouter(Router):
    """As in `Router`, without a tensor of its own."""

    def read_experts(self, experts: ReadableExperts) -> None:
        self._experts = [experts]  # in a list, so that they are no submodule

    def logits(self, hidden_TH: Tensor, tokens: RoutedTokens | None) -> Tensor:
        down_EbH = self._experts[0].first_part()
        answers_TN = F.linear(hidden_TH.float(), down_EbH.flatten(0, 1))
        return (answers_TN.unflatten(1, (len(down_EbH), -1)).square().sum(dim=-1) + EPSILON).sqrt()
