"""One training step: the pipeline schedule over the microbatches of a step, then the engine's step.

The objective is the mean over views of the view's weight times its token-weighted mean cross-entropy over the global
batch, plus the mean over microbatches and their views of the sum over layers of the auxiliary losses (each MoE layer
adds its own, as in Switch Transformer); these have no weights of views.
Every factor that a layout would otherwise bring in is cancelled here: the schedule divides by the number of
microbatches, the engine by the data-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """

    loss: float
    by_view: dict[View, float]
    sink_loss: float | None = None


def forward_backward(model: DistributedMoME, step: Step, forward_only: bool = False) -> StepLosses:
    """Run the schedule over a step's microbatches, leaving summed gradients on the local parameters.

    Every rank calls it with its part of the same step.
    """
    count = len(step.microbatches)
    data_parallel = parallel_state.get_data_parallel_world_size()
    context = step.microbatches[0].tokens.context
    # Sum of cross-entropies of one microbatch -> its part of the mean over tokens and views.
    share = 1 / (step.label_tokens * len(step.views))
    # What the engine divides by, so that a sum over all sequences of the step becomes their mean.
    sequence_share = data_parallel / (step.utterances * len(step.views))

    def forward_step(batches: Any, stage: Chunk) -> tuple[Tensor, Any]:
        batch: MicroBatch = next(batches)

        def loss_of(cross_entropy_V: Tensor) -> tuple[Tensor, Tensor]:
            part_V = cross_entropy_V * share
            return (part_V * step.weights_V).sum() * (count * data_parallel), part_V.detach()

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
    coefficient = 0.0 if forward_only else model.parts()[0].sink_loss
    return _reduce(parts, [chunk.take_sink_loss() for chunk in model.parts()], coefficient, step)


def _reduce(parts: Sequence[Tensor], sinks: Sequence[Tensor | None], coefficient: float, step: Step) -> StepLosses:
    """Add up the parts of all ranks in one exchange: of the views, [V] each and unweighted, which only the last
    pipeline stage has, and of the sink loss, weighted by its coefficient and by what the engine divides by."""
    views = step.views
    device = step.microbatches[0].tokens.context.members_VN.device
    sums_X = torch.zeros(len(views) + 1, dtype=torch.float64, device=device)
    for part_V in parts:
        sums_X[:-1] += part_V
    for sink in sinks:
        if sink is not None:
            sums_X[-1] += sink
    dist.all_reduce(sums_X, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(sums_X, group=parallel_state.get_pipeline_model_parallel_group())
    *losses, sink_loss = sums_X.tolist()
    by_view: dict[View, float] = {}
    for view, loss in zip(views, losses, strict=True):  # a view may come twice
        by_view[view] = by_view.get(view, 0.0) + loss * len(views) / views.count(view)
    return StepLosses(
        sum(weight * loss for weight, loss in zip(step.weights, losses, strict=True)),
        by_view,
        sink_loss / (coefficient * parallel_state.get_data_parallel_world_size()) if coefficient else None,
    )
