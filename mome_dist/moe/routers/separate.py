"""A linear map of its own for each group of tokens: what MoME's shared router is compared with.

The experts stay those of all tokens. Groups are the rates of a view, its task, or the modality of a token; by modality,
text (words, prompt, and the tags around speech) is a group of its own, and so is every token that is written. By rate
or task, text belongs to its view as speech does.

All maps lie in one parameter, and every token is multiplied with all of them where the tokens of a pass differ in
group: what another group's map gives is dropped, so its gradient is exactly zero, on every rank. A pass of one view is
multiplied with the view's map only.

Shape suffixes: as in `mome_dist.moe.routers.base`; G groups.
Source: the ablation of MoME (arXiv 2510.04136, table 7); its text does not say how text is routed by modality.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.moe.routers.base import RoutedTokens, Router
from mome_dist.moe.routers.group_settings import SeparateSettings
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routers.token_groups import TokenGroups
from mome_dist.packed_module import PackedTensor


class SeparateRouter(Router):
    """As in `Router`; a bias of the choice is that of all groups.

    Attributes:
        packed: fp32 [G * E * H], the map of one group after the other, saved as ``weight.GROUP``, [E, H] each.
        groups: their names, in this order.
    """

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        assert isinstance(spec.settings, SeparateSettings)
        self._groups = TokenGroups(spec.settings, spec.views)
        self.groups = self._groups.names
        self.packed = nn.Parameter(torch.empty(len(self.groups) * experts * hidden_size))

    def tensors(self) -> Iterator[PackedTensor]:
        size = self.experts * self.hidden_size
        for number, group in enumerate(self.groups):
            yield PackedTensor(f"weight.{group}", self.packed, number * size, (self.experts, self.hidden_size))
        yield from self.states()

    def logits(self, hidden_TH: Tensor, tokens: RoutedTokens | None) -> Tensor:
        maps_REH = self.maps(tokens).unflatten(0, (-1, self.experts))
        # One product a map, and not one of all: how a product adds up depends on its width, to the last bit.
        products = [F.linear(hidden_TH.float(), map_EH) for map_EH in maps_REH]
        return self.logits_of(products[0] if len(products) == 1 else torch.cat(products, dim=1), tokens)

    def maps(self, tokens: RoutedTokens | None) -> Tensor:
        rows_RH, group = self.packed.view(-1, self.hidden_size), self.used(tokens)
        return rows_RH if group is None else rows_RH[group * self.experts : (group + 1) * self.experts]

    def logits_of(self, products_TR: Tensor, tokens: RoutedTokens | None) -> Tensor:
        if products_TR.shape[1] == self.experts:
            return products_TR
        products_TGE, group = products_TR.unflatten(1, (-1, self.experts)), self._groups.of(tokens)
        if isinstance(group, int):
            return products_TGE[:, group]
        index_T1E = group.to(products_TR.device)[:, None, None].expand(-1, 1, self.experts)
        return products_TGE.gather(1, index_T1E)[:, 0]

    def used(self, tokens: RoutedTokens | None) -> int | None:
        """The group of all tokens of a view; None where they may differ. By modality rows stay laid out: the tokens of
        a prefix differ, those that follow do not."""
        group: Hashable = None if self._groups.by_modality else self._groups.of(tokens)
        return group if isinstance(group, int) else None
