"""The sink loss: keeps the tokens before the text from growing alike to the first one, on which attention gathers.

``mean over sequences, layers but the last, and tokens i >= 1 before the text of cos(h_0, h_i)^2``, on the hidden states
that a layer gives. h_0 is the first token's, ``<bos>`` where the LLM has one. The tokens before the text are ``<bos>``,
speech with its tags, and the prompt. Gradients join the backward pass, as those of the balance loss do
(`mome_dist.moe.balance`): each layer's term is of that layer's output alone, so pipeline stages need nothing of each
other. Tensor-parallel ranks with parts of the tokens exchange first tokens. The terms themselves are left to whoever
adds up the losses of a step (`mome_dist.training.step`).

Shape suffixes: N a rank's tokens, B sequences of the pass, F first tokens that the rank has, H hidden size.
Source: "Mitigating Attention Sinks and Massive Activations in Audio-Visual Speech Recognition with LLMs" (arXiv
2510.22603), by the authors of MoME, with a coefficient of 10,000.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mome_dist.token_context import TokenContext
from mome_dist.transfer import sent_to

TINY = 1e-8  # least norm of a hidden state that is divided by


class PrefixSinks:
    """What layers need of a pass to add the gradient of the sink loss.

    Args:
        weight_N: fp32, what a token's squared cosine counts for in the step's loss; zero for first and dead tokens and
            for those of the text.
        sequence_N: int64, the sequence of a token.
        rows_F: int64, where the rank has first tokens.
        sequences_F: int64, the sequences that these begin.
        sequences: B.
        group: the ranks that have the other tokens of the pass; None if this one has all.
        terms: gets the term of every layer in the backward pass, over all ranks of the group: fp32 scalars.
    """

    def __init__(
        self,
        weight_N: Tensor,
        sequence_N: Tensor,
        rows_F: Tensor,
        sequences_F: Tensor,
        sequences: int,
        group: dist.ProcessGroup | None,
        terms: list[Tensor],
    ) -> None:
        self._weight_N, self._sequence_N, self._group, self._terms = weight_N, sequence_N, group, terms
        self._rows_F, self._sequences_F, self._sequences = rows_F, sequences_F, sequences

    @classmethod
    def of(
        cls,
        context: TokenContext,
        weight: float,
        terms: list[Tensor],
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> Self:
        """The sinks of a pass.

        Args:
            context: of the whole pass; it knows how long prefixes are.
            weight: of the mean over a prefix's tokens after the first, in one layer.
            terms: where the terms go, each ``sum of weight * cos(h_0, h_i)^2`` of a layer.
            rank, group: which consecutive part of the tokens this rank has, of how many ranks.
        """
        assert context.prefixes is not None, "whoever packs sequences says where their text begins"
        lengths, size = torch.tensor(context.lengths), context.tokens
        sequence_N, weight_N = torch.zeros(size, dtype=torch.int64), torch.zeros(size)
        sequence_N[: context.alive] = torch.arange(len(lengths)).repeat_interleave(lengths)
        starts = [0, *accumulate(context.lengths)][:-1]
        for start, prefix in zip(starts, context.prefixes, strict=True):
            weight_N[start + 1 : start + prefix] = weight / max(prefix - 1, 1)
        own = size if group is None else size // dist.get_world_size(group)
        first = rank * own
        here = [number for number, start in enumerate(starts) if first <= start < first + own]
        rows_F = torch.tensor([starts[number] - first for number in here], dtype=torch.int64)
        part, device = slice(first, first + own), context.modality_N.device
        return cls(
            sent_to(weight_N[part].contiguous(), device),
            sent_to(sequence_N[part].contiguous(), device),
            sent_to(rows_F, device),
            sent_to(torch.tensor(here, dtype=torch.int64), device),
            len(starts),
            group,
            terms,
        )

    def __call__(self, hidden_N1H: Tensor) -> Tensor:
        """The same hidden states, whose backward pass adds the gradient of their term."""
        return _AddSink.apply(hidden_N1H, self)

    def gradient(self, hidden_NH: Tensor) -> Tensor:
        """The gradient of ``sum of weight * cos(h_0, h_i)^2`` by the rank's hidden states of any dtype, fp32 [N, H].

        That sum joins the terms.
        """
        hidden_NH = hidden_NH.float()
        norms_N1 = hidden_NH.norm(dim=1, keepdim=True).clamp(min=TINY)
        units_NH = hidden_NH / norms_N1
        firsts_BH = self._summed(self._at_first(units_NH.index_select(0, self._rows_F)))
        partner_NH = firsts_BH.index_select(0, self._sequence_N)
        cosine_N1 = (units_NH * partner_NH).sum(dim=1, keepdim=True)
        factor_N1 = 2 * self._weight_N[:, None] * cosine_N1
        gradient_NH = (partner_NH - cosine_N1 * units_NH) * (factor_N1 / norms_N1)
        # What the others of its sequence, on any rank, pull at a first token with; the term goes along in a last row.
        pull_NH = factor_N1 * (units_NH - cosine_N1 * partner_NH)
        pull_BH = firsts_BH.new_zeros(self._sequences + 1, firsts_BH.shape[1]).index_add_(0, self._sequence_N, pull_NH)
        pull_BH[-1, 0] = (factor_N1 * cosine_N1).sum() / 2
        pull_BH = self._summed(pull_BH)
        self._terms.append(pull_BH[-1, 0].clone())
        pull_FH = pull_BH.index_select(0, self._sequences_F) / norms_N1.index_select(0, self._rows_F)
        return gradient_NH.index_add_(0, self._rows_F, pull_FH)

    def _at_first(self, rows_FH: Tensor) -> Tensor:
        """[B, H], zero for the sequences that begin on other ranks."""
        return rows_FH.new_zeros(self._sequences, rows_FH.shape[1]).index_copy(0, self._sequences_F, rows_FH)

    def _summed(self, rows_BH: Tensor) -> Tensor:
        if self._group is not None:
            dist.all_reduce(rows_BH, group=self._group)
        return rows_BH


class _AddSink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_N1H: Tensor, sinks: PrefixSinks) -> Tensor:
        ctx.sinks = sinks
        ctx.save_for_backward(hidden_N1H)
        return hidden_N1H.view_as(hidden_N1H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (hidden_N1H,) = ctx.saved_tensors
        return gradients[0] + ctx.sinks.gradient(hidden_N1H[:, 0])[:, None].to(gradients[0].dtype), None
