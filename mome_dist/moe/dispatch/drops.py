"""Which routes a full expert takes, and where those go that it does not take.

An expert has C slots for a rank's tokens. `kept` says which of the routes that ask for it get one: the most probable or
the first. Under "reroute" those without a slot then go where there is room: pairs of a token and another of its
candidates are taken in the order of their probability, if the expert has room and the token lacks an expert. Equal
pairs are taken in the order of tokens, then of experts, so that the same routes always give the same.

That order needs no loop over pairs: both sides like probable pairs best, so that tokens may ask for their best
candidates at once, experts keep the most probable ones, and who was refused asks for its next one, until nobody is.
What comes out is what the loop gives (Gale and Shapley, 1962).

Source: GShard (arXiv 2006.16668) for capacity; "position" is its order. Capacity-Aware Inference (arXiv 2503.05066) for
the other two; it reroutes in inference. Here that is for training alone, since a token would depend on its neighbours.
The order of pairs, and that no rerouted token takes the slot of one that asked first, are this project's.
Shape suffixes: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mome_dist.moe.routing import Routing


def slots(tokens: int, mean_top_k: float, experts: int, factor: float, least: int) -> int:
    """C: what an expert takes of a rank's tokens.

    Args:
        tokens: of the rank that has most of them.
        mean_top_k: experts of a token in the mean.
        factor: of the even share, ``tokens * mean_top_k / experts``.
        least: number of slots.
    """
    return max(math.ceil(tokens * mean_top_k / experts * factor), least)


def kept(routing: Routing, capacity: int, policy: str) -> Tensor:
    """Bool [T, K]: the routes of tokens, not of padding, that their experts take."""
    selected_TE = routing.selected_TE()
    if policy == "position":
        kept_TE = selected_TE & (selected_TE.cumsum(dim=0) <= capacity)
    else:
        strength_TE = torch.where(selected_TE, routing.probs_TE.detach(), -1.0)
        kept_TE = selected_TE & _among_first(strength_TE, capacity, dim=0)
    kept_TK = kept_TE.gather(1, routing.experts_TK)
    return kept_TK if routing.chosen_TK is None else kept_TK & routing.chosen_TK


def rerouted(routing: Routing, kept_TK: Tensor, capacity: int, candidates: int | None) -> tuple[Tensor, Tensor]:
    """The experts that tokens use once routes without a slot went to others; the host waits for a number each round.

    Args:
        routing: of tokens that all use K experts.
        kept_TK: of `kept`.
        candidates: the most probable experts of a token that it may go to; None for all.

    Returns:
        int64 [T, K], the experts, those of routes without a slot as they were; and bool [T, K], which have one.
    """
    selected_TE, probs_TE = routing.selected_TE(), routing.probs_TE.detach()
    missing_TK = ~kept_TK if routing.valid_T is None else ~kept_TK & routing.valid_T[:, None]
    lacking_T1 = missing_TK.sum(dim=1, keepdim=True)
    kept_TE = torch.zeros_like(selected_TE).scatter_(1, routing.experts_TK, kept_TK)
    room_E = capacity - kept_TE.sum(dim=0)
    open_TE = ~selected_TE & (lacking_T1 > 0) & (room_E > 0)
    if candidates is not None:
        open_TE &= _among_first(probs_TE, candidates, dim=1)
    while True:
        asked_TE = open_TE & _among_first(torch.where(open_TE, probs_TE, -1.0), lacking_T1, dim=1)
        taken_TE = asked_TE & _among_first(torch.where(asked_TE, probs_TE, -1.0), room_E, dim=0)
        refused_TE = asked_TE & ~taken_TE
        if not bool(refused_TE.any()):
            break
        open_TE &= ~refused_TE
    # The first of a token's routes without a slot goes to the most probable of what it got, and so on.
    best_TK = torch.where(taken_TE, probs_TE, -1.0).sort(dim=1, descending=True, stable=True).indices
    number_TK = (missing_TK.cumsum(dim=1) - 1).clamp(min=0)
    found_TK = missing_TK & (number_TK < taken_TE.sum(dim=1, keepdim=True))
    return torch.where(found_TK, best_TK.gather(1, number_TK), routing.experts_TK), kept_TK | found_TK


def _among_first(values: Tensor, number: int | Tensor, dim: int) -> Tensor:
    """Bool: which are among the so many largest along a dimension; of equal ones the first."""
    order = values.sort(dim=dim, descending=True, stable=True).indices
    places = torch.arange(values.shape[dim], device=values.device)
    places = (places[:, None] if dim == 0 else places).expand_as(order)
    return torch.empty_like(order).scatter_(dim, order, places) < number
