"""Experts that a token's group names, with nothing learned: what a learned choice is compared with.

Every group (the rates of a view, its task, or a modality) has K experts, drawn from its name alone: the same in every
run, layer and layout. Each has a gate of 1 / K. Two groups may share experts, and some experts may serve none.

Source: Hash Layers (arXiv 2106.04426) hash words; speech tokens have no number, so that groups are hashed here instead,
which is this project's choice.
Shape suffixes: as in `mome_dist.moe.routers.base`; G groups.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mome_dist.moe.routers.base import RoutedTokens, Router
from mome_dist.moe.routers.group_settings import GroupedSettings
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routers.token_groups import TokenGroups
from mome_dist.moe.routing import Routing


def drawn_experts(groups: Sequence[str], experts: int, count: int) -> Tensor:
    """int64 [G, count], different experts of each group, drawn from its name."""
    generators = (torch.Generator().manual_seed(zlib.crc32(name.encode())) for name in groups)
    drawn = [torch.randperm(experts, generator=generator, device="cpu")[:count] for generator in generators]
    return torch.stack(drawn)


class HashRouter(Router):
    """As in `Router`; nothing in it trains, and nothing is saved."""

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        assert isinstance(spec.settings, GroupedSettings)
        self._groups = TokenGroups(spec.settings, spec.views)
        drawn_GK = drawn_experts(self._groups.names, experts, top_k)
        self.register_buffer("_experts_GK", drawn_GK, persistent=False)

    def logits(self, hidden_TH: Tensor, tokens: RoutedTokens | None) -> Tensor:
        """Zero for all: experts have no scores."""
        return hidden_TH.new_zeros(len(hidden_TH), self.experts, dtype=torch.float32)

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        assert isinstance(self._experts_GK, Tensor)
        experts_TK = self._groups.rows(self._experts_GK, tokens).expand(len(logits_TE), -1).contiguous()
        gates_TK = logits_TE.new_full(experts_TK.shape, 1 / self.top_k)
        valid_T = None if tokens is None else tokens.alive_N
        if valid_T is not None:
            gates_TK = gates_TK * valid_T[:, None]
        return Routing(experts_TK, gates_TK, logits_TE.softmax(dim=-1), logits_TE, valid_T)
