"""Two experts that are drawn in training, with an estimate of the gradient of the draw itself.

Twice over: experts whose logit is far below the largest, ``(max - s_e) / max(|s_e|, max) > 2 eps``, are masked; in
training one of the others is drawn with their probabilities, a softmax over them; its gate is its probability. The
second draw is without the first expert. Where the drawn expert is not the most probable one, its gate counts a third in
the forward pass with a probability of 3/4, after Heun's third-order rule ``f(x) - f(0) = f'(x) / 4 + 3/4 f'(x / 3)``;
the gradient is that of the whole gate. In evaluation the largest logits are taken, with gates by the same softmax.

What is drawn is a function of the token, the layer and the seed (`mome_dist.draws`), in fp32: all layouts draw alike.

Source: SparseMixer-v2 in GRIN (arXiv 2409.12136): masks, draws, scale, gradient and two experts as in the released
code, which draws with ``exponential_().log()`` in the precision of the logits, where half precision has infinities.
Shape suffixes: as in `mome_dist.moe.routers.base`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mome_dist.draws import gumbels, uniforms
from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.registry import GrinSettings
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.moe.routing import Routing

WHOLE = 0.25  # probability that the gate of an expert that is not the most probable one counts whole


class GrinRouter(TopKRouter):
    """As in `TopKRouter`, but for the choice."""

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        lowest = torch.finfo(logits_TE.dtype).min  # not -inf, of which differences are not numbers
        left_TE, experts, gates = logits_TE, list[Tensor](), list[Tensor]()
        for number in range(self.top_k):
            if number:
                left_TE = left_TE.scatter(1, experts[-1], lowest)
            seen_TE = left_TE.masked_fill(self._far(logits_TE, left_TE), lowest)
            expert_T1, gate_T1 = self._drawn(seen_TE, number, tokens)
            experts.append(expert_T1)
            gates.append(gate_T1)
        experts_TK, gates_TK = torch.cat(experts, dim=1), torch.cat(gates, dim=1)
        valid_T = None if tokens is None else tokens.alive_N
        if valid_T is not None:
            gates_TK = gates_TK * valid_T[:, None]
        return Routing(experts_TK, gates_TK, logits_TE.softmax(dim=-1), logits_TE, valid_T)

    @torch.no_grad()
    def _far(self, logits_TE: Tensor, left_TE: Tensor) -> Tensor:
        """Bool [T, E], experts that are masked because of the largest logit that is left."""
        assert isinstance(self.spec.settings, GrinSettings)
        most_T1 = left_TE.amax(dim=1, keepdim=True)
        return (most_T1 - left_TE) / logits_TE.abs().maximum(most_T1) > 2 * self.spec.settings.epsilon

    def _drawn(self, seen_TE: Tensor, number: int, tokens: RoutedTokens | None) -> tuple[Tensor, Tensor]:
        """An expert and its gate, [T, 1] each."""
        probs_TE, best_T1 = seen_TE.softmax(dim=1), seen_TE.argmax(dim=1, keepdim=True)
        if not self.training:
            return best_T1, probs_TE.gather(1, best_T1)
        draws_N, purpose = self.draws(tokens, number)
        expert_T1 = (seen_TE + gumbels(draws_N, purpose, self.experts)).argmax(dim=1, keepdim=True)
        whole_T1 = (expert_T1 == best_T1) | (uniforms(draws_N, purpose + self.experts, 1) < WHOLE)
        gate_T1 = probs_TE.gather(1, expert_T1)
        counted_T1 = torch.where(whole_T1, gate_T1, gate_T1 / 3).detach()
        return expert_T1, counted_T1 + (gate_T1 - gate_T1.detach())  # the difference is zero, and has the gradient
