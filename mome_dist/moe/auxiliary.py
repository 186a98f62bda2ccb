"""What a module with a router does in training beside its output: its routes are counted, and its losses join the
backward pass.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from mome_dist.moe.balance import add_balance, add_batch_loss
from mome_dist.moe.load import PassLoad, StackLoad
from mome_dist.moe.routers.base import Router
from mome_dist.moe.routing import Routed, Routing
from mome_dist.token_context import FixedTokens, TokenContext


class Auxiliary(NamedTuple):
    """A module's place among those of its stage, and the coefficients of its balance loss and its z-loss."""

    place: int
    balance_loss: float
    z_loss: float


def counted(
    output: Tensor,
    routing: Routed,
    kept_TK: Tensor | None,
    tokens: TokenContext | FixedTokens,
    load: PassLoad | StackLoad,
    router: Router,
    settings: Auxiliary,
) -> Tensor:
    """The same output, whose backward pass adds the gradients of the module's losses; its routes are left to be
    counted.

    Args:
        output: of the module, or anything in it that its output depends on.
        routing: of its tokens; a `Routing` where the router has losses of its own.
        kept_TK: bool [T, K], the routes that an expert took; None if none can be dropped.
        tokens: of the pass, as many as the routing has.
        load: where to count.
    """
    values_TS = cast(Routing, routing).values_TS if router.has_batch_loss else None
    sums_VS = None if values_TS is None else tokens.members_VN @ values_TS
    place, balance_loss, z_loss = settings
    if load.counting:
        load.put(place, tokens, router.experts, routing.experts_TK, kept_TK, routing.chosen_TK, sums_VS)
    own = router.losses(cast(Routing, routing)) if router.has_losses else ()
    if torch.is_grad_enabled() and (balance_loss or z_loss or own):
        output = add_balance(output, routing, tokens.members_VN, load, place, balance_loss, z_loss, own)
    if sums_VS is not None and torch.is_grad_enabled():
        assert isinstance(load, PassLoad), "captured layers have no loss of the whole batch"
        output = add_batch_loss(output, sums_VS, load, place, router.batch_loss)
    if load.distillation is not None:
        probs_TE = cast(Routing, routing).probs_TE
        if load.counting:
            load.distillation.put(place, probs_TE)
        if torch.is_grad_enabled():
            output = load.distillation.join(output, probs_TE, place)
    return output
