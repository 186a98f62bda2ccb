"""One training step: the pipeline schedule over the microbatches of a step, then the engine's step.

The objective is the mean over views of the view's weight times its token-weighted mean cross-entropy over the global
batch, plus the mean over microbatches and their views of the sum over layers of the auxiliary losses (each MoE layer
adds its own, as in Switch Transformer); these have no weights of views. Where coarse views learn from fine ones, the
means over pairs of views of their divergences over the global batch join it.
Every factor that a layout would otherwise bring in is cancelled here: the schedule divides by the number of
microbatches, the engine by the data-parallel size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mome_dist.model.distributed import Chunk, DistributedMoME, MicroBatch
from mome_dist.speech.views import View
from mome_dist.training.batches import Step


@dataclass(frozen=True)
class StepLosses:
    """Losses of one step over the global batch, equal on all ranks.

    Attributes:
        loss: mean over views of the weighted mean token cross-entropy; with a weight of 1 each, their mean.
        by_view: mean token cross-entropy of each view, without weights.
        sink_loss: the mean squared cosine of `mome_dist.llm.sinks`, without its coefficient; None where it is no part
            of the objective, and without a backward pass.
        divergences: of what fine views teach coarse ones, by term ("route_kl", "logit_kl") and pair of views, without
            coefficients: means over coarse speech tokens and layers, or over labels. Only those of the objective.
    """

    loss: float
    by_view: dict[View, float]
    sink_loss: float | None = None
    divergences: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def forward_backward(model: DistributedMoME, step: Step, forward_only: bool = False) -> StepLosses:
    """Run the schedule over a step's microbatches, leaving summed gradients on the local parameters.

    Every rank calls it with its part of the same step.
    """
    count, views = len(step.microbatches), len(step.views)
    data_parallel = parallel_state.get_data_parallel_world_size()
    context = step.microbatches[0].tokens.context
    # Sum of cross-entropies of one microbatch -> its part of the mean over tokens and views.
    share = 1 / (step.label_tokens * views)
    logit_kl = model.parts()[0].cross_rate.logit_kl
    # What the engine divides by, so that a sum over all sequences of the step becomes their mean.
    sequence_share = data_parallel / (step.utterances * views)

    def forward_step(batches: Any, stage: Chunk) -> tuple[Tensor, Any]:
        batch: MicroBatch = next(batches)

        def loss_of(sums_X: Tensor) -> tuple[Tensor, Tensor]:
            part_V = sums_X[:views] * share
            loss = (part_V * step.weights_V).sum()
            divergence_Q = sums_X[views:] / step.label_tokens
            if len(divergence_Q):
                loss = loss + divergence_Q.sum() * (logit_kl / len(divergence_Q))
            return loss * (count * data_parallel), torch.cat([part_V, divergence_Q]).detach()

        return stage(batch, data_parallel / count, sequence_share), loss_of

    parts: Sequence[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        # The interleaved schedule reads the microbatches once for each chunk.
        data_iterator=[iter(step.microbatches) for _ in model.chunks],
        model=model.parts(),
        num_microbatches=count,
        # Only the interleaved schedule needs sizes; the others exchange shapes.
        seq_length=context.tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    for chunk in model.parts():
        chunk.settle()
    return _reduce(parts, model.parts(), step, forward_only)


def _reduce(parts: Sequence[Tensor], chunks: Sequence[Chunk], step: Step, forward_only: bool) -> StepLosses:
    """Add up the parts of all ranks in one exchange: of the views and, where logits are compared, of their pairs, [V]
    or [V + Q] each and unweighted, which only the last pipeline stage has; of the pairs' routes, [Q] each; and of the
    sink loss, weighted by its coefficient and by what the engine divides by."""
    views, pairs = step.views, [pair.name(step.views) for pair in step.pairs]
    device = step.microbatches[0].tokens.context.members_VN.device
    sums_X = torch.zeros(len(views) + 2 * len(pairs) + 1, dtype=torch.float64, device=device)
    for part_X in parts:
        sums_X[: len(part_X)] += part_X
    for chunk in chunks:
        route_Q, sink = chunk.take_route_divergence(), chunk.take_sink_loss()
        if route_Q is not None:
            sums_X[-1 - len(pairs) : -1] += route_Q
        if sink is not None:
            sums_X[-1] += sink
    dist.all_reduce(sums_X, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(sums_X, group=parallel_state.get_pipeline_model_parallel_group())
    *sums, sink_loss = sums_X.tolist()
    losses, rest = sums[: len(views)], sums[len(views) :]
    divergences = {"logit_kl": rest[: len(pairs)], "route_kl": rest[len(pairs) :]}
    by_view: dict[View, float] = {}
    for view, loss in zip(views, losses, strict=True):  # a view may come twice
        by_view[view] = by_view.get(view, 0.0) + loss * len(views) / views.count(view)
    terms, coefficient = chunks[0].cross_rate, 0.0 if forward_only else chunks[0].sink_loss
    asked = {} if forward_only or not pairs else {"route_kl": terms.route_kl, "logit_kl": terms.logit_kl}
    return StepLosses(
        sum(weight * loss for weight, loss in zip(step.weights, losses, strict=True)),
        by_view,
        sink_loss / (coefficient * parallel_state.get_data_parallel_world_size()) if coefficient else None,
        {term: _by_name(pairs, divergences[term]) for term, weight in asked.items() if weight},
    )


def _by_name(pairs: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """By the names of pairs, of which one may come twice: then the mean."""
    found: dict[str, float] = {}
    for pair, value in zip(pairs, values, strict=True):
        found[pair] = found.get(pair, 0.0) + value / pairs.count(pair)
    return found
