"""The K best experts, and a router that learns from all of them.

Forward, this is `top_k` bit for bit. Backward, the choice is taken for the identity (straight through): the router gets
``dL/dW_e = <dL/dy, E_e(h)>`` for every expert e, chosen or not, as if the output were the soft mixture
``sum over all e of W_e E_e(h)``. W are the probabilities P; where gates are divided by the sum S of the K chosen ones
(`mome.renormalize`), W is P / S, of which those of experts that were not chosen take S for a constant. Experts get the
gradients that they get in `top_k`: none where they were not chosen.

Every expert's output must be there, which `mome.dispatch=local` and `gather` have anyway: there it costs a few more
passes over gates.

Source: DenseMixer (Yao et al., 2025, "Improving MoE post-training with precise router gradients"): estimate, W with and
without division and the experts' gradients as in the released code. Sigmoid scores in the place of P are this
project's.
Shape suffixes: as in `mome_dist.moe.routers.base`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.moe.routing import Routing


class DenseGradientRouter(TopKRouter):
    """As in `TopKRouter`, but for the gradient."""

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        best = super().route(logits_TE, tokens)
        if not torch.is_grad_enabled():
            return best
        weights_TE = best.probs_TE if self.spec.score == "softmax" else best.logits_TE.sigmoid()
        if self.spec.renormalize:
            sums_T1 = weights_TE.gather(1, best.experts_TK).sum(dim=1, keepdim=True)
            chosen_TE = torch.zeros_like(weights_TE, dtype=torch.bool).scatter_(1, best.experts_TK, True)
            weights_TE = weights_TE / torch.where(chosen_TE, sums_T1, sums_T1.detach())
        # The difference is exactly zero, and has the gradient.
        through_TE = weights_TE - weights_TE.detach()
        if best.valid_T is not None:
            through_TE = through_TE * best.valid_T[:, None]
        dense_TE = best.gates_TE().detach() + through_TE
        return replace(best, gates_TK=dense_TE.gather(1, best.experts_TK), dense_TE=dense_TE)
