"""Logit distillation: a coarse view learns the words that the LLM expects after a fine one, not only the right word.

``KL(fine || coarse)`` of the distributions over the vocabulary that predict the same label of the same clip in two
views of a step; the fine one is a constant. Each tensor-parallel rank has a part of the vocabulary.

Shape suffixes: L labels of all views of a pass, view by view; C labels of one view; Z a rank's part of the vocabulary;
Q pairs of views.
Source: Hinton et al. (arXiv 1503.02531) at a temperature of 1, within one model and one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mome_dist.aligned_tokens import ViewPair


def logit_divergence(
    logits_LZ: Tensor, views: int, pairs: Sequence[ViewPair], group: dist.ProcessGroup | None
) -> Tensor:
    """Sums over the labels of each pair, fp32 [Q], equal on all ranks; gradients reach the coarse views' logits alone.

    Args:
        logits_LZ: fp32, of as many labels in each view, in one order.
        views: how many there are.
        group: the ranks with the other parts of the vocabulary; None if this one has all.
    """
    return _Divergence.apply(logits_LZ, views, tuple(pairs), group)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_LZ: Tensor, views: int, pairs: tuple[ViewPair, ...], group: dist.ProcessGroup | None
    ) -> Tensor:
        logs_LZ = _log_softmax(logits_LZ, group)
        of_views = logs_LZ.chunk(views)
        probs = {fine: of_views[fine].exp() for fine, _ in pairs}
        sums_Q = torch.stack([(probs[fine] * (of_views[fine] - of_views[coarse])).sum() for fine, coarse in pairs])
        if group is not None:
            dist.all_reduce(sums_Q, group=group)
        ctx.views, ctx.pairs = views, pairs
        ctx.save_for_backward(logs_LZ)
        return sums_Q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (logs_LZ,) = ctx.saved_tensors
        of_views, gradient_LZ = logs_LZ.chunk(ctx.views), torch.zeros_like(logs_LZ)
        rows = gradient_LZ.chunk(ctx.views)
        for (fine, coarse), weight in zip(ctx.pairs, gradients[0], strict=True):
            rows[coarse].add_((of_views[coarse].exp() - of_views[fine].exp()) * weight)
        return gradient_LZ, None, None, None


def _log_softmax(logits_LZ: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Over the whole vocabulary."""
    if group is None:
        return logits_LZ.log_softmax(dim=1)
    largest_L1 = logits_LZ.max(dim=1, keepdim=True).values
    dist.all_reduce(largest_L1, op=dist.ReduceOp.MAX, group=group)
    shifted_LZ = logits_LZ - largest_L1
    total_L1 = shifted_LZ.exp().sum(dim=1, keepdim=True)
    dist.all_reduce(total_L1, group=group)
    return shifted_LZ - total_L1.log()
