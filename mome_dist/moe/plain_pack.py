"""Experts of any form and their router, cast once for any number of passes that need no gradient.

Shape suffixes: T tokens, H hidden size, E routed experts, K of them a token, S shared ones, X all (routed first).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.packed import Choose


class Pack(Protocol):
    """All experts of a layer and their router, laid out for inference."""

    def added_to(self, base_TH: Tensor, hidden_TH: Tensor, choose: Choose) -> Tensor:
        """``base + MoME(hidden)``: [T, H]."""


class Computed(Protocol):
    """What a pack asks of a form (`mome_dist.moe.forms.base.ExpertForm`)."""

    def enter(self, hidden_TH: Tensor, *common: Tensor) -> Tensor: ...

    def dense(self, hidden_TH: Tensor, routed: Sequence[Tensor], gates_TE: Tensor) -> Tensor: ...

    def leave(self, output_TD: Tensor, *common: Tensor) -> Tensor: ...


class PlainPack:
    """A `Pack` for every form, in the precision of the hidden states; the router stays in fp32.

    Args:
        form: of the experts.
        maps_RH: of the router, fp32 (`mome_dist.moe.routers.base.Router.maps`); None if it has none.
        stacks: stacked parts of the routed experts, and of shared ones if there are any.
        dtype: of the hidden states.
        common: tensors of the layer that its experts share.
    """

    def __init__(
        self,
        form: Computed,
        maps_RH: Tensor | None,
        stacks: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        common: Sequence[Tensor] = (),
    ) -> None:
        self._form, self._maps_RH = form, None if maps_RH is None else maps_RH.detach().float().clone()
        self._common = [part.detach().to(dtype) for part in common]
        self._parts_X = [torch.cat([part.detach() for part in parts]).to(dtype) for parts in zip(*stacks, strict=True)]
        routed, experts, device = len(stacks[0][0]), len(self._parts_X[0]), stacks[0][0].device
        self._shared_S = torch.arange(routed, experts, device=device)
        self._is_shared_1X = (torch.arange(experts, device=device) >= routed).float()[None]

    def added_to(self, base_TH: Tensor, hidden_TH: Tensor, choose: Choose) -> Tensor:
        """As `Pack.added_to`. One token on a CPU reads the weights of its experts only; more go through all experts,
        and the gates are a mask."""
        experts_TK, gates_TK = choose(None if self._maps_RH is None else F.linear(hidden_TH.float(), self._maps_RH))
        if len(hidden_TH) == 1 and hidden_TH.device.type == "cpu":
            experts = torch.cat([experts_TK[0], self._shared_S])
            gates = torch.cat([gates_TK, gates_TK.new_ones(1, len(self._shared_S))], dim=1)
            own = [part.index_select(0, experts) for part in self._parts_X]
            return base_TH + self._of(hidden_TH, own, gates)
        gates_TX = self._is_shared_1X.expand(len(hidden_TH), -1).scatter_add(1, experts_TK, gates_TK)
        return base_TH + self._of(hidden_TH, self._parts_X, gates_TX)

    def _of(self, hidden_TH: Tensor, parts_X: Sequence[Tensor], gates_TX: Tensor) -> Tensor:
        inside_TD = self._form.enter(hidden_TH, *self._common)
        return self._form.leave(self._form.dense(inside_TD, parts_X, gates_TX), *self._common)
