"""The choice of routers: a score for every routed expert, then top-K.

Scores are a softmax over the experts (MoME) or the sigmoid of each expert's own logit (DeepSeek-V3). A bias may be
added to the scores for the choice alone, which balances the experts without a loss (`mome_dist.moe.balance`); the gates
are always the scores without it.

Shape suffixes: T tokens, E routed experts, K experts a token, H hidden size. Everything here is fp32, whatever the
precision of the LLM: a bf16 softmax over tens of experts reorders near-ties.
Source: MoME (arXiv 2510.04136), equation of the routed branch; renormalisation as in the same authors' related systems;
DeepSeek-V3 (arXiv 2412.19437) equations 13-16 for sigmoid scores and the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Routed(Protocol):
    """What a pass of training keeps of a layer's routes: enough to count them, and to balance them."""

    @property
    def experts_TK(self) -> Tensor:
        """int64 [T, K], the chosen experts."""

    @property
    def chosen_TK(self) -> Tensor | None:
        """As in `Routing`."""

    def balance_sums(self, members_VT: Tensor, squares: bool) -> Tensor:
        """What the balance losses are made of, with gradients: fp32 [V, E] or [V, E + 1].

        Args:
            members_VT: fp32 [V, T], 1 where a token counts for a view, else 0.
            squares: whether the last column is asked for; it may be there otherwise.

        Returns:
            Sums over the tokens of each view: of their probabilities, then of the squares of the z-loss.
        """


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Attributes:
        experts_TK: int64 [T, K], the chosen experts, highest score (plus bias) first.
        gates_TK: fp32 [T, K], their weights; zero for tokens that are padding.
        probs_TE: fp32 [T, E], the scores of all routed experts as probabilities: they add up to one, with those of
            null experts where there are any.
        logits_TE: fp32 [T, E].
        valid_T: bool [T], False for padding; None if every token counts.
        chosen_TK: bool [T, K], where tokens may use less than K experts: which of the columns count. The others name
            any expert, with a gate of zero. None if all count.
        values_TS: fp32 [T, S], of which the router has a loss (`mome_dist.moe.routers.base.Router.batch_loss`); None
            without one.
    """

    experts_TK: Tensor
    gates_TK: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    valid_T: Tensor | None
    chosen_TK: Tensor | None = None
    values_TS: Tensor | None = None

    def selected_TE(self) -> Tensor:
        """Bool [T, E]: the (token, expert) pairs that count, padding excluded."""
        if self.chosen_TK is None:
            selected = torch.zeros_like(self.probs_TE, dtype=torch.bool).scatter_(1, self.experts_TK, True)
        else:  # a column that does not count may name an expert that another one counts
            selected = torch.zeros_like(self.probs_TE).scatter_add_(1, self.experts_TK, self.chosen_TK.float()) > 0
        return selected if self.valid_T is None else selected & self.valid_T[:, None]

    def restricted_to(self, valid_T: Tensor) -> Routing:
        """The same routing with the tokens outside ``valid_T`` taken for padding."""
        return replace(self, gates_TK=self.gates_TK * valid_T[:, None], valid_T=valid_T)

    def gates_TE(self) -> Tensor:
        """fp32 [T, E]: the gate of every expert, zero where it was not chosen."""
        gates_TE = torch.zeros_like(self.probs_TE)
        if self.chosen_TK is None:
            return gates_TE.scatter(1, self.experts_TK, self.gates_TK)
        return gates_TE.scatter_add(1, self.experts_TK, self.gates_TK)

    def balance_sums(self, members_VT: Tensor, squares: bool) -> Tensor:
        """As `Routed.balance_sums`."""
        if not squares:
            return members_VT @ self.probs_TE
        squares_T1 = self.logits_TE.logsumexp(dim=-1, keepdim=True).square()
        return members_VT @ torch.cat([self.probs_TE, squares_T1], dim=1)


@dataclass(frozen=True)
class Passes:
    """A `Routed` of several passes of the same tokens through the same experts: their routes together."""

    each: tuple[Routed, ...]

    @property
    def experts_TK(self) -> Tensor:
        """int64 [T, C K], those of one pass after the other."""
        return torch.cat([routed.experts_TK for routed in self.each], dim=1)

    @property
    def chosen_TK(self) -> Tensor:
        """bool [T, C K]: all; an expert of several passes counts as often."""
        return torch.ones_like(self.experts_TK, dtype=torch.bool)

    def balance_sums(self, members_VT: Tensor, squares: bool) -> Tensor:
        """As `Routed.balance_sums`, the mean over passes."""
        return torch.stack([routed.balance_sums(members_VT, squares) for routed in self.each]).mean(dim=0)


def joined(routings: Sequence[Routing]) -> Routing:
    """Routings of several passes of the same tokens as one of as many more tokens: those of one pass after the other.
    What is a mean over its tokens is a mean over passes, too."""
    if len(routings) == 1:
        return routings[0]
    valid = [routing.valid_T for routing in routings if routing.valid_T is not None]
    return Routing(
        torch.cat([routing.experts_TK for routing in routings]),
        torch.cat([routing.gates_TK for routing in routings]),
        torch.cat([routing.probs_TE for routing in routings]),
        torch.cat([routing.logits_TE for routing in routings]),
        torch.cat(valid) if valid else None,
    )


def route(
    logits_TE: Tensor,
    top_k: int,
    renormalize: bool,
    valid_T: Tensor | None = None,
    *,
    score: str = "softmax",
    bias_E: Tensor | None = None,
) -> Routing:
    """Choose the experts of each token.

    Args:
        logits_TE: [T, E] in any float dtype.
        top_k: experts a token, at most E.
        renormalize: divide the K gates by their sum, so that they add up to one.
        valid_T: bool [T]; tokens marked False get gates of zero and appear in no count.
        score: "softmax" over all experts, or "sigmoid" of each expert's logit.
        bias_E: fp32 [E], added to the scores for the choice, and only there.
    """
    logits_TE = logits_TE.float()
    # Everything in logarithms up to the last softmax: no sum of scores that underflows, whichever experts are chosen.
    strength_TE = logits_TE if score == "softmax" else F.logsigmoid(logits_TE)
    probs_TE = strength_TE.softmax(dim=-1)
    scores_TE = probs_TE if score == "softmax" else logits_TE.sigmoid()
    # Scores rise with logits, which do not saturate.
    choice_TE = logits_TE if bias_E is None else scores_TE + bias_E
    experts_TK = choice_TE.topk(top_k, dim=-1).indices
    gates_TK = strength_TE.gather(1, experts_TK).softmax(dim=-1) if renormalize else scores_TE.gather(1, experts_TK)
    if valid_T is not None:
        gates_TK = gates_TK * valid_T[:, None]
    return Routing(experts_TK, gates_TK, probs_TE, logits_TE, valid_T)


def choose_experts(
    logits_TE: Tensor, top_k: int, renormalize: bool, *, score: str = "softmax", bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``experts_TK`` and ``gates_TK`` of `route` and nothing else: for passes that no loss and no statistic looks at.

    Args:
        logits_TE: fp32 [T, E]; all else as in `route`.
    """
    if bias_E is not None or (score == "softmax" and not renormalize):
        routing = route(logits_TE, top_k, renormalize, score=score, bias_E=bias_E)
        return routing.experts_TK, routing.gates_TK
    best = logits_TE.topk(top_k, dim=-1)  # scores rise with logits
    if not renormalize:
        return best.indices, best.values.sigmoid()
    strength_TK = best.values if score == "softmax" else F.logsigmoid(best.values)
    return best.indices, strength_TK.softmax(dim=-1)


def entropy(logits_TE: Tensor) -> Tensor:
    """fp32 [T], ``-sum_e P_e ln P_e`` of the softmax over the experts, in nats."""
    logs_TE = logits_TE.log_softmax(dim=-1)
    return -(logs_TE.exp() * logs_TE).sum(dim=-1)


def masked_gates(logits_TK: Tensor, chosen_TK: Tensor) -> Tensor:
    """fp32 [T, K]: a softmax over those that count, zero for the others; all zero where none does."""
    lowest = torch.finfo(logits_TK.dtype).min  # not -inf: of it alone, a softmax is not a number
    return logits_TK.masked_fill(~chosen_TK, lowest).softmax(dim=-1) * chosen_TK
