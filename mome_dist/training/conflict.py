"""Whether the views of a step pull each expert, and the router, the same way: cosines between their gradients.

Every ``mome.conflict_every`` steps, the step's batch goes through the model once more in each of its views by itself,
before the step is trained on. Each time the engine reduces the gradients as in training, and forgets them: what trains
afterwards finds everything as it was. A gradient is that of the view's cross-entropy and balance loss over
the global batch. It costs as many passes as another step, and memory for one more gradient of the experts and routers
for each view.

A line of ``conflicts.jsonl`` has ``step``, ``views``, ``pairs`` (of two views, by their places), and by pair
``experts`` [pairs][layers][experts] and ``router`` [pairs][layers]: cosines, three digits, null where a view has no
gradient there. A router's is of all that trains in it; an expert's of all its parts. 1 is one direction, below 0 a view
undoes what another one does.

Shape suffixes: V views; Q pairs of them; L layers of the LLM; E routed experts; P numbers of an expert.
Source: cosines of gradients as a measure of conflict between tasks, Yu et al. (arXiv 2001.06782); by expert and rate
this is the project's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mome_dist.engine.engine import Engine
from mome_dist.model.distributed import DistributedMoME
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.speech.views import View
from mome_dist.training.batches import BatchBuilder, Step
from mome_dist.training.step import forward_backward


def conflicts_of_step(
    model: DistributedMoME, engine: Engine, builder: BatchBuilder, batch: Sequence[int], views: Sequence[View]
) -> dict[str, Any] | None:
    """A line of ``conflicts.jsonl`` without its step, the same on all ranks, which all call it; None where the step has
    one view.

    Args:
        builder, batch, views: as of the step itself, whose features are there.
    """
    distinct = list(dict.fromkeys(views))
    if len(distinct) < 2:
        return None
    cosines_QLX = view_cosines(model, engine, (_alone(builder, batch, view) for view in distinct))
    experts, router = cosines_QLX[..., :-1].tolist(), cosines_QLX[..., -1].tolist()
    return {
        "views": [str(view) for view in distinct],
        "pairs": [list(pair) for pair in combinations(range(len(distinct)), 2)],
        "experts": _rounded(experts),
        "router": _rounded(router),
    }


def _alone(builder: BatchBuilder, batch: Sequence[int], view: View) -> Step:
    """The step in one view, whose gradients end at the features."""
    step = builder.build(batch, [view])
    microbatches = [
        dataclasses.replace(
            each,
            features={stream: [values.detach() for values in clips] for stream, clips in each.features.items()},
            aligned=None,
        )
        for each in step.microbatches
    ]
    return dataclasses.replace(step, microbatches=microbatches, pairs=(), task_weights={})


def _rounded(values: Any) -> Any:
    """Nested lists of numbers, for JSON."""
    if isinstance(values, list):
        return [_rounded(each) for each in values]
    return round(values, 3) if math.isfinite(values) else None


def view_cosines(model: DistributedMoME, engine: Engine, steps: Iterator[Step]) -> Tensor:
    """Cosines between the gradients of steps, fp32 [Q, L, E + 1] on the CPU, the router in the last column; nan where
    one of them is zero. Every rank calls it; weights, optimiser, counts and random states stay as they are."""
    device = next(model.parameters()).device
    gradients: list[list[tuple[Tensor, Tensor]]] = []  # by step and layer, of experts and router
    with _uncounted(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for step in steps:
            with engine.accumulate():
                forward_backward(model, step)
                for parameter in model.lora.parameters() if model.lora is not None else ():
                    parameter.grad = torch.zeros_like(parameter)  # all ranks reduce the same tensors
            gradients.append([_gradients(engine, mome) for mome in model.spread.values()])
            engine.discard()
    experts = next((mome.num_experts for mome in model.spread.values()), 1)
    pairs = list(combinations(range(len(gradients)), 2))
    # Products of two gradients, and squares of either: sums over ranks of what each has.
    found_3QLX = torch.zeros(3, len(pairs), model.config.num_layers, experts + 1, device=device)
    for place, (number, mome) in enumerate(model.spread.items()):
        own = slice(mome.ep_rank * mome.num_local_experts, (mome.ep_rank + 1) * mome.num_local_experts)
        for column, part in ((own, 0), (slice(experts, None), 1)):
            if part == 1 and mome.ep_rank > 0:
                continue  # the router is the same on all of them
            rows = torch.stack([of_layers[place][part] for of_layers in gradients])
            grams_XVV = torch.einsum("vxp,wxp->xvw", rows, rows)
            for q, (one, other) in enumerate(pairs):
                for kind, (a, b) in enumerate(((one, other), (one, one), (other, other))):
                    found_3QLX[kind, q, number, column] = grams_XVV[:, a, b]
    for group in _groups(model):
        dist.all_reduce(found_3QLX, group=group)
    product, one, other = found_3QLX.cpu()
    return product / (one * other).sqrt()


def _gradients(engine: Engine, mome: ExpertParallelMoME) -> tuple[Tensor, Tensor]:
    """The reduced gradients of a module's experts on this rank, [E, P], and of its router, [1, P]."""
    experts = engine.gradient(mome.deepspeed_moe.experts.packed).detach().float().clone()
    router = [engine.gradient(parameter).detach().float().flatten() for parameter in mome.router.parameters()]
    device = experts.device
    return experts.view(mome.num_local_experts, -1), torch.cat([torch.zeros(1, device=device), *router])[None]


def _groups(model: DistributedMoME) -> Iterator[dist.ProcessGroup]:
    """The ranks that have other experts, and those that have other layers."""
    expert_parallel = next((mome for mome in model.spread.values() if mome.ep_size > 1), None)
    if expert_parallel is not None:
        group = expert_parallel.deepspeed_moe.ep_group
        assert isinstance(group, dist.ProcessGroup)
        yield group
    yield parallel_state.get_pipeline_model_parallel_group()


@contextmanager
def _uncounted(model: DistributedMoME) -> Iterator[None]:
    """Passes inside are in no count of routes."""
    kept = [chunk.set_counts_aside() for chunk in model.parts()]
    try:
        yield
    finally:
        for chunk, counts in zip(model.parts(), kept, strict=True):
            chunk.take_counts_back(counts)
