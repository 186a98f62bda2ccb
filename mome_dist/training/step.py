"""One training step: the pipeline schedule over the microbatches of a step, then the engine's step.

The objective is the mean over views of the token-weighted mean cross-entropy over the global batch, plus the mean over
microbatches of the sum over layers of the auxiliary losses (each MoE layer adds its own, as in Switch Transformer).
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
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from mome_dist.parallel.model import Chunk, DistributedMoME, MicroBatch
from mome_dist.speech.views import View
from mome_dist.training.batches import Step


@dataclass(frozen=True)
class StepLosses:
    """Losses of one step over the global batch, equal on all ranks.

    Attributes:
        loss: mean over views of the mean token cross-entropy.
        by_view: mean token cross-entropy of each view.
    """

    loss: float
    by_view: dict[View, float]


def forward_backward(model: DistributedMoME, step: Step, forward_only: bool = False) -> StepLosses:
    """Run the schedule over a step's microbatches, leaving summed gradients on the local parameters.

    Every rank calls it with its part of the same step.
    """
    count = len(step.microbatches)
    data_parallel = parallel_state.get_data_parallel_world_size()
    # Sum of cross-entropies of one microbatch -> its part of the mean over tokens and views.
    weight = 1 / (step.label_tokens * len(step.views))

    def forward_step(batches: Any, stage: Chunk) -> tuple[Tensor, Any]:
        batch: MicroBatch = next(batches)

        def loss_of(cross_entropy: Tensor) -> tuple[Tensor, tuple[View, Tensor]]:
            part = cross_entropy * weight
            return part * (count * data_parallel), (batch.view, part.detach())

        return stage(batch), loss_of

    device = step.microbatches[0].tokens.ids_BS.device
    MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 1 / count, device=device))
    parts: Sequence[tuple[View, Tensor]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        # The interleaved schedule reads the microbatches once for each chunk.
        data_iterator=[iter(step.microbatches) for _ in model.chunks],
        model=model.parts(),
        num_microbatches=count,
        # Only the interleaved schedule needs sizes; the others exchange shapes.
        seq_length=step.microbatches[0].tokens.ids_BS.shape[1],
        micro_batch_size=step.microbatches[0].tokens.ids_BS.shape[0],
        forward_only=forward_only,
    )
    return _reduce(parts, step.views, device)


def _reduce(parts: Sequence[tuple[View, Tensor]], views: Sequence[View], device: torch.device) -> StepLosses:
    """Add up the parts of all ranks; only the last pipeline stage has any."""
    distinct = list(dict.fromkeys(views))
    sums = torch.zeros(len(distinct), dtype=torch.float64, device=device)
    for view, part in parts:
        sums[distinct.index(view)] += part
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    by_view = {view: float(total) * len(views) / views.count(view) for view, total in zip(distinct, sums, strict=True)}
    return StepLosses(float(sums.sum()), by_view)
