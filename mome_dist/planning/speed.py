"""How long a step takes, from operations, bytes and calls at the rates of a cluster.

Nothing is assumed to overlap but gathered weights, which travel beside the frozen layer. Frozen products run twice
(forward, and the gradient of their input); a third time where a layer is computed again. The pipeline fills and empties
once a step (1F1B, arXiv 2104.04473), after its clips are encoded (`mome_dist.planning.encoders`). The constants are
counted from the code: how many bytes an operation on every value reads and writes, how many operations a layer calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from mome_dist.llm.shape import LLMShape
from mome_dist.planning.experts import expert_seconds
from mome_dist.planning.flops import OUTPUT_PRODUCTS, TRAINED, attention_flops, frozen_flops
from mome_dist.planning.hardware import Cluster, Link
from mome_dist.planning.job import Candidate, Job, held_parameters

FP32 = 4
# Bytes read and written for each value of ``element_bytes`` = 2, forward and backward, and the forward part of them: of
# the two norms and the residual sums (per hidden value), of the gated activation (per feed-forward unit), of rotation
# and copies (per value of queries and keys), of explicit attention (per score), of the cross-entropy (per logit).
NORM_BYTES, GATE_BYTES, ROTATION_BYTES, SCORE_BYTES, LOGIT_BYTES = 210, 48, 60, 78, 44
FORWARD_SHARE = 0.4
LAYER_CALLS, STEP_CALLS = 150, 600  # operations of a frozen layer, forward and backward; of a microbatch besides
# Bytes that clipping and AdamW read and write for a parameter; operations for a tensor that is reduced and stepped.
OPTIMIZER_BYTES, TENSOR_CALLS = 52, 12
# Tensors of a MoME module that train, whatever the number of experts; those of shared ones are their form's parts.
ROUTED_TENSORS, ROUTER_TENSORS = 1, 1
# Of the low-rank terms of a layer, whatever their number: operations forward and backward, and tensors that train.
LOW_RANK_CALLS, LOW_RANK_TENSORS = 25, 2


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go to.

    Attributes:
        encoders: encoding the clips of the step, for which all ranks wait; 0 where features are cached.
        products: matrix products of the frozen layers and the output layer, on the slowest stage.
        passes: their operations on every value, and calls.
        experts: MoME modules, dispatch included.
        tensor_links: collectives of tensor parallelism.
        waiting: the pipeline's bubble and transfers, and for a core where processes share cores.
        reduction: of gradients over ranks.
        optimizer: clipping and the step, with what ZeRO gathers.
    """

    encoders: float
    products: float
    passes: float
    experts: float
    tensor_links: float
    waiting: float
    reduction: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds altogether."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by the name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class _Pass:
    """Seconds of one microbatch on one stage, forward and backward."""

    products: float
    passes: float
    experts: float
    links: float

    @property
    def total(self) -> float:
        return self.products + self.passes + self.experts + self.links

    @property
    def busy(self) -> float:
        """Without waiting for others."""
        return self.products + self.passes + self.experts


def step_time(job: Job, candidate: Candidate, cluster: Cluster) -> StepTime:
    """The predicted step of a job on a cluster."""
    passes = _schedule(job, replace(candidate, zero=0), cluster)
    reduction, optimizer = _after_backward(job, candidate, cluster)
    encoders = _encoding(job, candidate, cluster)
    return replace(passes, encoders=encoders, reduction=reduction, optimizer=optimizer)


def _encoding(job: Job, candidate: Candidate, cluster: Cluster) -> float:
    """Seconds in which the ranks of the first stage encode, and tell each other their shares."""
    layout, (clips, own) = candidate.layout, candidate.encoded(job)
    at_once = min(layout.tp * layout.dp, cluster.ranks_per_node)  # ranks of the first stage lie side by side
    turns = max(1.0, at_once / cluster.workers)
    link = cluster.link(layout.tp)
    return sum(
        turns * encoder.step_seconds(own, cluster) + _one_way(encoder.feature_bytes(clips), layout.tp, link)
        for encoder in job.encoders
    )


@lru_cache(maxsize=8)  # a search asks for the same passes with every ZeRO stage
def _schedule(job: Job, candidate: Candidate, cluster: Cluster) -> StepTime:
    """Forward and backward passes of all microbatches."""
    layout, count = candidate.layout, candidate.accumulation
    distinct = sorted({0, layout.pp - 1, layout.pp // 2})
    stages = [_pass(job, candidate, cluster, at) for at in distinct]
    slowest = max(stages, key=lambda stage: stage.total)
    # Stages between the ends are alike.
    weights = [1, layout.pp - 2, 1] if layout.pp > 2 else [1] * layout.pp
    busy = sum(w * s.busy for w, s in zip(weights, _in_order(stages, layout.pp), strict=True)) / layout.pp
    bubble = (layout.pp - 1) * slowest.total
    if layout.pp > 1:
        span = layout.tp * layout.dp * 2  # this stage and the next
        hidden = sum(count for _, count in candidate.mean_pass(job)) * job.shape.hidden_size * job.element_bytes
        link = cluster.link(span)
        transfer = hidden / (layout.tp if layout.sequence_parallel else 1) / link.bytes_per_second + link.latency
        bubble += 2 * (count + layout.pp - 1) * transfer
    schedule = count * slowest.total + bubble
    shared_cores = count * busy * cluster.ranks_per_node / cluster.workers
    return StepTime(
        encoders=0.0,
        products=count * slowest.products,
        passes=count * slowest.passes,
        experts=count * slowest.experts,
        tensor_links=count * slowest.links,
        waiting=max(schedule, shared_cores) - count * slowest.total,
        reduction=0.0,
        optimizer=0.0,
    )


def _in_order(stages: list[_Pass], pp: int) -> list[_Pass]:
    """First, middle and last stage from the distinct ones (of two stages the middle is the last)."""
    return stages if pp > 2 else stages[:pp]


def _pass(job: Job, candidate: Candidate, cluster: Cluster, stage: int) -> _Pass:
    layout, shape = candidate.layout, job.shape.with_padded_heads(candidate.layout.tp)
    layers, views = layout.stages(shape.layers)[stage], candidate.mean_pass(job)
    tokens = sum(count for _, count in views)
    flops, moved, links = _layer(job, shape, candidate, cluster, views)
    low_flops, low_moved, low_links = _terms(job, candidate, cluster, tokens)
    flops, moved, links = flops + low_flops, moved + low_moved, links + low_links
    experts = layers * expert_seconds(job, candidate, cluster, tokens)
    again = 1 + FORWARD_SHARE if layout.recompute == "full" else 1.0
    products, bytes_moved, calls = layers * flops, layers * moved * again, layers * _layer_calls(job) * again
    if layout.recompute == "full":
        products, experts = products * 1.5, experts * (1 + 1 / 3)
    links *= layers
    if stage == layout.pp - 1:
        labels = candidate.utterances(job) * job.labels * job.views_per_step
        logits = labels * shape.vocabulary / layout.tp
        products += OUTPUT_PRODUCTS * logits * shape.hidden_size
        bytes_moved += LOGIT_BYTES * logits
    if stage == 0:
        products += 6 * job.projector_parameters * tokens / len(job.lengths)
    passes = bytes_moved / cluster.memory_bytes + (calls + STEP_CALLS) * cluster.call
    return _Pass(products / cluster.flops(job.precision), passes, experts, links)


def _layer(
    job: Job, shape: LLMShape, candidate: Candidate, cluster: Cluster, views: Sequence[tuple[int, float]]
) -> tuple[float, float, float]:
    """FLOP and bytes moved of one frozen layer, and the seconds of its collectives; forward and backward."""
    layout, hidden = candidate.layout, shape.hidden_size
    wide, tokens = job.element_bytes / 2, sum(count for _, count in views)
    causal = job.attention == "sdpa"
    attention = sum(attention_flops(shape, length, count, causal) for length, count in views) / layout.tp
    if layout.recompute == "selective":
        attention *= 4 / 3
    flops = frozen_flops(shape, tokens) / layout.tp + attention
    split = layout.tp if layout.sequence_parallel else 1
    scores = 0.0 if causal else sum(count * length for length, count in views) * shape.heads / layout.tp
    if layout.recompute == "selective":
        scores *= 1 + FORWARD_SHARE
    turned = tokens * (shape.heads + shape.kv_heads) * shape.head_size / layout.tp
    moved = (
        NORM_BYTES * tokens * hidden / split
        + wide * (GATE_BYTES * tokens * shape.ffn_size / layout.tp + ROTATION_BYTES * turned)
        + SCORE_BYTES * scores
    )
    # Two sums over tensor-parallel ranks forward, two backward; split sequences gather and scatter the same bytes.
    sums = 6 if layout.recompute == "full" else 4
    link = cluster.link(layout.tp)
    return flops, moved, sums * all_reduce(tokens * hidden * job.element_bytes, layout.tp, link)


def _terms(job: Job, candidate: Candidate, cluster: Cluster, tokens: float) -> tuple[float, float, float]:
    """What `_layer` gives, of the low-rank terms of a layer: every token goes through all of them."""
    if job.terms is None:
        return 0.0, 0.0, 0.0
    layout, e = candidate.layout, job.element_bytes
    ranks, hidden, out = layout.tp, job.shape.hidden_size, job.term_widths / layout.tp
    here = tokens / (ranks if layout.sequence_parallel else 1)
    flops = 2 * TRAINED * job.low_width * (here * hidden + tokens * out / 2)
    # Factors are cast and laid in order, there and back; what they give is written, added, and its gradient copied.
    factors = job.low_width * (hidden + out / 2)
    moved = (4 * FP32 + 2 * e) * factors + e * (8 * tokens * out + 10 * tokens * job.low_width)
    # What is narrow is gathered and its gradient scattered; without sequence parallelism its gradient is summed.
    return flops, moved, all_reduce(tokens * job.low_width * e, ranks, cluster.link(ranks))


def _layer_calls(job: Job) -> int:
    """Operations that a layer with its low-rank terms calls, forward and backward."""
    return LAYER_CALLS + (0 if job.terms is None else LOW_RANK_CALLS)


def _after_backward(job: Job, candidate: Candidate, cluster: Cluster) -> tuple[float, float]:
    """Seconds of the reduction of gradients, and of the optimiser with what ZeRO gathers; the largest stage's."""
    layout = candidate.layout
    layers = max(layout.stages(job.shape.layers))
    shared, routed, partial = held_parameters(job, layout, layers, first_stage=True)
    copies = layout.dp // layout.ep
    link = cluster.link(layout.tp * layout.dp)
    of_layer = (ROUTED_TENSORS + ROUTER_TENSORS) * (job.experts > 0) + len(job.form.parts) * (job.shared > 0)
    of_layer += len(job.form.common) * (job.all_experts > 0)
    of_layer += 0 if job.terms is None else LOW_RANK_TENSORS
    tensors = layers * of_layer
    reduction = all_reduce(FP32 * shared, layout.dp, link) + all_reduce(FP32 * routed, copies, link)
    reduction += tensors * TENSOR_CALLS * cluster.call
    if layout.sequence_parallel:
        reduction += all_reduce(FP32 * partial, layout.tp, cluster.link(layout.tp))
    held = shared / layout.dp + routed / copies if candidate.zero else shared + routed
    optimizer = OPTIMIZER_BYTES * held / cluster.memory_bytes + tensors * TENSOR_CALLS * cluster.call
    if candidate.zero:
        optimizer += _one_way(FP32 * shared, layout.dp, link) + _one_way(FP32 * routed, copies, link)
    return reduction, optimizer


def all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds of a sum of ``size`` bytes over ranks: every byte is scattered and gathered once."""
    return 2 * _one_way(size, ranks, link)


def _one_way(size: float, ranks: int, link: Link) -> float:
    if ranks == 1:
        return 0.0
    return size * (ranks - 1) / ranks / link.bytes_per_second + link.latency * math.ceil(math.log2(ranks))
