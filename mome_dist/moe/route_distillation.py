"""Route distillation: the routers of a coarse view learn what they do for the same frames in a fine one.

Of every coarse speech token and layer, ``KL(target || P)``: P are the router's probabilities of the token, the target
their mean over the fine tokens that share its frames (`mome_dist.speech.cross_rate`), as a constant. The loss is the
mean over layers, pairs of views, and coarse tokens of a pair in the global batch. Null experts of a router are left out
on both sides: distributions are over routed experts.

The gradient joins the backward pass of a layer, as that of the balance loss does (`mome_dist.moe.balance`). By then the
targets are whole: tensor-parallel ranks that hold parts of the tokens add up their parts of all targets of a stage in
one collective, beside whatever follows the forward pass.

Shape suffixes: T tokens of the rank; M, W, Q as in `mome_dist.speech.cross_rate`; E routed experts; H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mome_dist.aligned_tokens import Aligned


class RouteDistillation:
    """The term of one pass.

    Args:
        aligned: the tokens that this rank holds.
        weight: what the mean over pairs and tokens of one layer counts for in the step's loss, with what the engine
            will divide by.
        group: the ranks that hold the other tokens of the pass; None if this one has all.
        terms: gets the sums of a layer in its backward pass, without ``weight``: fp32 [Q].
    """

    def __init__(self, aligned: Aligned, weight: float, group: dist.ProcessGroup | None, terms: list[Tensor]) -> None:
        self._aligned, self._group, self._terms = aligned, group, terms
        self._weights_M1 = (aligned.weights_QM.sum(dim=0) * (weight / len(aligned.pairs)))[:, None]
        self._put: dict[int, Tensor] = {}
        self._targets: dict[int, Tensor] = {}
        self._work: dist.Work | None = None

    @torch.no_grad()
    def put(self, place: int, probs_TE: Tensor) -> None:
        """Take this rank's part of one module's targets."""
        fine_MWE = probs_TE[self._aligned.fine_MW]
        self._put[place] = (fine_MWE * self._aligned.shares_MW[..., None]).sum(dim=1)

    @torch.no_grad()
    def reduce(self) -> None:
        """Begin to add up the targets of all modules; all ranks of the group call it once all modules have put."""
        if not self._put:
            return
        targets_LME = torch.stack([self._put[place] for place in sorted(self._put)])
        self._begin_sum(targets_LME)
        self._targets = dict(zip(sorted(self._put), targets_LME, strict=True))
        self._put = {}

    def _begin_sum(self, targets_LME: Tensor) -> None:
        if self._group is not None:
            self._work = dist.all_reduce(targets_LME, group=self._group, async_op=True)

    def join(self, output_TH: Tensor, probs_TE: Tensor, place: int) -> Tensor:
        """The output of a module, whose backward pass adds the gradient of its term by the coarse tokens'
        probabilities."""
        coarse_ME = probs_TE.index_select(0, self._aligned.rows_M)
        return _AddTerm.apply(output_TH, log_shares(coarse_ME), self, place)

    def gradient(self, logs_ME: Tensor, place: int) -> Tensor:
        """The gradient by `log_shares` of the coarse tokens, fp32 [M, E]; the term joins the terms."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        target_ME = self._targets[place]
        target_ME = target_ME / target_ME.sum(dim=1, keepdim=True)
        divergence_M = (torch.xlogy(target_ME, target_ME) - target_ME * logs_ME).sum(dim=1)
        self._terms.append(self._aligned.weights_QM @ divergence_M)
        return -self._weights_M1 * target_ME


def log_shares(probs_ME: Tensor) -> Tensor:
    """Logarithms of probabilities that are made to add up to one, finite also where one has vanished in fp32."""
    logs_ME = probs_ME.clamp(min=torch.finfo(probs_ME.dtype).tiny).log()
    return logs_ME - probs_ME.sum(dim=1, keepdim=True).log()


class _AddTerm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output_TH: Tensor, logs_ME: Tensor, term: RouteDistillation, place: int) -> Tensor:
        ctx.term, ctx.place = term, place
        ctx.save_for_backward(logs_ME)
        return output_TH.view_as(output_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (logs_ME,) = ctx.saved_tensors
        return gradients[0], ctx.term.gradient(logs_ME, ctx.place), None, None
