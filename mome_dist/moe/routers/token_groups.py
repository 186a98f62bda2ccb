"""Which group each token of a pass is in: that of its view's rates, its view's task, or its modality.

Shape suffixes: as in `mome_dist.moe.routers.base`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mome_dist.adapters.terms import View
from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.group_settings import MODALITIES, GroupedSettings
from mome_dist.transfer import sent_to


class TokenGroups:
    """The groups of a run.

    Args:
        settings: what makes a group.
        views: that the run trains on.

    Attributes:
        names: of the groups, in order.
        by_modality: whether the tokens of a view may differ in group.
    """

    def __init__(self, settings: GroupedSettings, views: Sequence[View]) -> None:
        self.names, self.by_modality = settings.groups(views), settings.by == "modality"
        if self.by_modality:
            # Tokens of a modality that the run does not have are none.
            names = [name if name in self.names else "text" for name in MODALITIES]
            self._of_modality = tuple(map(self.names.index, names))
        else:
            self._of_view = {str(view): self.names.index(settings.group_of(view)) for view in views}

    def of(self, tokens: RoutedTokens | None) -> int | Tensor:
        """The group of every token, int64 [T], or of all; the first one of tokens that are dead."""
        assert tokens is not None, "which group a token is in is a matter of its view or modality"
        if self.by_modality:
            modality_N, of_modality = tokens.modality_N, self._of_modality
            if modality_N is None:
                return of_modality[MODALITIES.index("text")]
            table = torch.tensor(of_modality)
            return tokens.once(of_modality, lambda: sent_to(table, modality_N.device)[modality_N.long()])
        numbers = tuple(self._of_view[name] for name in tokens.view_names)
        if len(set(numbers)) == 1:
            return numbers[0]
        members_VN, table = tokens.members_VN, torch.tensor(numbers, dtype=torch.float32)
        return tokens.once(numbers, lambda: (sent_to(table, members_VN.device) @ members_VN).long())

    def rows(self, table_GX: Tensor, tokens: RoutedTokens | None) -> Tensor:
        """[T, X] or, if all tokens are in one group, [1, X]: each token's row of a table."""
        group = self.of(tokens)
        return table_GX[group][None] if isinstance(group, int) else table_GX.index_select(0, group.to(table_GX.device))

    def columns(self, values_TX: Tensor, tokens: RoutedTokens | None) -> Tensor:
        """fp32 [T, G X + G]: the values in the columns of the token's group, zero in those of others; then a one for
        its group. Their sums over tokens are what `means` takes."""
        one_hot_TG = self.rows(torch.eye(len(self.names), device=values_TX.device), tokens).expand(len(values_TX), -1)
        return torch.cat([(one_hot_TG[:, :, None] * values_TX[:, None]).flatten(1), one_hot_TG], dim=1)

    def means(self, sums_VS: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [G, X], the mean of each group over the tokens of all views, zero without any; and [G], 1 for groups
        that have tokens, else 0.

        Args:
            sums_VS: sums of `columns` over the tokens of each view.
        """
        number = len(self.names)
        sums_S = sums_VS.sum(dim=0)
        tokens_G1 = sums_S[-number:].detach()[:, None]
        means_GX = sums_S[:-number].unflatten(0, (number, -1)) / tokens_G1.clamp(min=1)
        return means_GX, (tokens_G1[:, 0] > 0).float()
