"""What experts in the LLM's queries and values (``mome.placement=qv``) go with."""

from __future__ import annotations

import math

from mome_dist.config.schema import MoMEConfig
from mome_dist.errors import UserError


def check_inside(mome: MoMEConfig) -> None:
    """Check what experts in queries and values go with, and that what is theirs alone has an effect.

    Raises:
        UserError: naming the keys.
    """
    if not mome.inside:
        if mome.scale != 1:
            raise UserError(
                f"mome.scale={mome.scale} is of experts in queries and values, but mome.placement={mome.placement}: "
                "set mome.scale=1, or mome=lora."
            )
        return
    if not 0 < mome.scale < math.inf:
        raise UserError(f"mome.scale={mome.scale}: what experts add is multiplied by it; set such as 1.")
    if mome.expert != "linear":
        raise UserError(
            f"mome.placement=qv has low-rank experts of queries and values, but mome.expert={mome.expert}: set "
            "mome.expert=linear (mome=lora sets both), or another mome.placement."
        )
    if mome.conflict_every:
        raise UserError(
            f"mome.conflict_every={mome.conflict_every} compares the gradients of experts that lie one by one, and "
            "those of mome.placement=qv are packed: set mome.conflict_every=0."
        )
    if mome.routed_experts < 2:
        experts = mome.routed_experts + mome.shared_experts
        raise UserError(
            f"mome.placement=qv with mome.routed_experts={mome.routed_experts} leaves a router nothing to choose, and "
            f"is a plain LoRA of rank {experts * mome.bottleneck}: set method=lora, which has terms by view too, or "
            "raise mome.routed_experts."
        )
    if mome.dispatch not in ("auto", "local"):
        raise UserError(
            f"mome.dispatch={mome.dispatch} does not go with mome.placement=qv: what experts add to queries and values "
            "is sliced by heads, beside which their tokens and weights would have to travel. Set mome.dispatch=local."
        )
