"""The shared router, whose scores are shifted by what a whole utterance is: its rates, its task, how it sounds.

``logits = W h + sum over what is configured of V_c g_c``, with g_c the learned embedding of the token's rates, task or
modality, or the mean of the utterance's speech tokens at this layer's input. V_c is zero at first: training starts as
`top_k`. Rates, task and mean shift all tokens of an utterance alike. The prefix with all speech is given as a whole, so
that its mean looks at nothing that is still to be written, and text has the same one in training and in decoding.

Two losses, with P of a token and its mean P' over the tokens of a view in the global batch: the mean over tokens of
``||P||_1 / ||P||_2``, 1 where a token is sure and the root of E where it is not; and ``E sum_e P'_e^2``, 1 where
experts are used evenly and E where one is used alone, in the mean over views.

Source: SpeechMoE2 (arXiv 2111.11831): a router that reads a layer's input beside a global embedding of the utterance's
domain or accent. Which embeddings, that each shifts the logits by a map of its own, and the start at zero are this
project's. The losses are SpeechMoE's (arXiv 2105.03036), recalled, not checked. A mean is of the products with V_c: the
product with the mean, which is the same, would need sums as wide as the hidden state.
Shape suffixes: as in `mome_dist.moe.routers.base`; B utterances, G groups, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.moe.balance import TokenLoss
from mome_dist.moe.routers.base import RoutedTokens, Router
from mome_dist.moe.routers.group_settings import ConditionSettings
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routers.token_groups import TokenGroups
from mome_dist.moe.routing import Routing
from mome_dist.packed_module import PackedTensor

EMBEDDING_SCALE = 50  # of the initial 0.02: standard deviation 1


class ConditionRouter(Router):
    """As in `Router`.

    Attributes:
        embedding_BY: fp32 [G * D], of one group by BY after the other, saved as ``embedding_BY.GROUP``.
        shift_BY: fp32 [E, D]; of the utterance [E, H].
        weight: fp32 [E, H].
    """

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        assert isinstance(spec.settings, ConditionSettings)
        self.settings = settings = spec.settings
        self._groups = {by: TokenGroups(each, spec.views) for by, each in settings.embedded.items()}
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        for by, groups in self._groups.items():
            setattr(self, f"embedding_{by}", nn.Parameter(torch.empty(len(groups.names) * settings.width)))
        for by in sorted(settings.by):
            width = hidden_size if by == "utterance" else settings.width
            setattr(self, f"shift_{by}", nn.Parameter(torch.empty(experts, width)))
        self._prefix_BE: Tensor | None = None  # in evaluation, the means of the utterances that text is written after

    def logits(self, hidden_TH: Tensor, tokens: RoutedTokens | None) -> Tensor:
        # One product a map, and not one of all: how a product adds up depends on its width, to the last bit.
        maps = [self.weight, *([self.get_parameter("shift_utterance")] if self.settings.of_utterance else [])]
        return self.logits_of(torch.cat([F.linear(hidden_TH.float(), each) for each in maps], dim=1), tokens)

    def maps(self, tokens: RoutedTokens | None) -> Tensor:
        if not self.settings.of_utterance:
            return self.weight
        return torch.cat([self.weight, self.get_parameter("shift_utterance")])

    def logits_of(self, products_TR: Tensor, tokens: RoutedTokens | None) -> Tensor:
        logits_TE = products_TR[:, : self.experts]
        for by, groups in self._groups.items():
            embedding_GD = self.get_parameter(f"embedding_{by}").view(-1, self.settings.width)
            table_GE = F.linear(embedding_GD, self.get_parameter(f"shift_{by}"))
            # A product with ones and zeros, whose gradient is one too: the same bits every time.
            one_hot_TG = groups.rows(torch.eye(len(groups.names), device=table_GE.device), tokens)
            logits_TE = logits_TE + one_hot_TG @ table_GE
        if not self.settings.of_utterance:
            return logits_TE
        assert tokens is not None, "how an utterance sounds is a matter of its tokens"
        means_BE = tokens.speech_means(products_TR[:, self.experts :])
        if means_BE is None:
            means_BE = self._prefix_BE
            assert means_BE is not None, "text is written after a prefix"
        elif not torch.is_grad_enabled():
            self._prefix_BE = means_BE
        return logits_TE + tokens.of_utterances(means_BE, len(products_TR))

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        routing = super().route(logits_TE, tokens)
        return replace(routing, values_TS=routing.probs_TE) if self.has_batch_loss else routing

    def losses(self, routing: Routing) -> Sequence[TokenLoss]:
        if not self.has_losses:
            return ()
        return [TokenLoss(self.settings.sparsity_loss, 1 / routing.probs_TE.norm(dim=1))]  # whose sum is 1

    def batch_loss(self, sums_VS: Tensor, tokens_V: Tensor) -> Tensor:
        means_VE = sums_VS / tokens_V[:, None]
        return self.settings.importance_loss * self.experts * means_VE.square().sum(dim=1).mean()

    @property
    def decides(self) -> bool:
        return False

    @property
    def has_losses(self) -> bool:
        return self.settings.sparsity_loss > 0

    @property
    def has_batch_loss(self) -> bool:
        return self.settings.importance_loss > 0

    def tensors(self) -> Iterator[PackedTensor]:
        for name, parameter in self.named_parameters():
            groups = self._groups.get(name.removeprefix("embedding_"))
            if groups is None or not name.startswith("embedding_"):
                yield PackedTensor(name, parameter, 0, tuple(parameter.shape))
                continue
            for number, group in enumerate(groups.names):
                yield PackedTensor(f"{name}.{group}", parameter, number * self.settings.width, (self.settings.width,))
        yield from self.states()

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        own = name.rpartition(".router_")[2]
        if own.startswith("shift_"):
            return torch.zeros(shape)
        value = super().initial_value(name, shape, seed)
        return EMBEDDING_SCALE * value if own.startswith("embedding_") else value
