"""What a rank keeps in memory, counted tensor by tensor from what the code keeps.

Frozen weights have their own precision and nothing beside them. What trains is fp32: weights, gradients and, under
ZeRO partitioned, a copy of the weights and the optimiser's moments. Activations are what autograd keeps of a layer
until its backward pass; a pipeline stage keeps as many microbatches as are in flight in the 1F1B schedule (arXiv
2104.04473): the first stage ``pp``, the last one 1. ``benchmarks/plan_layout.py`` compares the sums with real runs.

Formulas use the names of the paper on activation recomputation (arXiv 2205.05198) where it has one: T tokens of a
microbatch, H hidden size, F feed-forward width, S sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from mome_dist.config.deepspeed.keys import BUCKET_ELEMENTS
from mome_dist.llm.shape import LLMShape
from mome_dist.planning.job import Candidate, Job, held_parameters

FP32, INDEX = 4, 8  # bytes
ROW_PADDING = 1.06  # rows that each expert's group is padded by in the all-to-all dispatch


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest moment.

    Attributes:
        frozen: weights of the LLM.
        trained: fp32 weights of MoME, projectors and LoRA, with ZeRO's copy of this rank's partition.
        gradients: of what trains.
        moments: the optimiser's running averages.
        activations: of the frozen layers and their low-rank terms, for all microbatches in flight.
        experts: activations of the MoME modules, gathered weights and dispatched rows included.
        logits: of label positions, on the last stage.
        encoders: weights of those that work in every step, and the features of its clips, on the first stage.
        working: what one layer's backward pass, the reduction of gradients, or encoding needs for a moment.
        runtime: of the libraries and the device's context.
    """

    frozen: float
    trained: float
    gradients: float
    moments: float
    activations: float
    experts: float
    logits: float
    encoders: float
    working: float
    runtime: float

    @property
    def total(self) -> float:
        """Bytes altogether."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Bytes by the name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def memory(job: Job, candidate: Candidate, stage: int, runtime: float = 0.0, reserves: bool = False) -> Memory:
    """Peak of a rank of pipeline stage ``stage``.

    Args:
        runtime: bytes that libraries and device context take before anything is built.
        reserves: whether memory that ZeRO reserves to reduce gradients is occupied; on a CPU only what is touched is.
    """
    layout, shape = candidate.layout, job.shape.with_padded_heads(candidate.layout.tp)
    layers, last = layout.stages(shape.layers)[stage], stage == layout.pp - 1
    shared, routed, _ = held_parameters(job, layout, layers, stage == 0)
    shared_share, routed_share = _shares(candidate)
    partition = shared * shared_share + routed * routed_share
    trained = FP32 * (shared + routed + (partition if candidate.zero else 0))
    gradients = FP32 * (shared + routed)
    moments = FP32 * job.moments * partition
    bucket = FP32 * BUCKET_ELEMENTS if reserves and candidate.zero else 0
    views, in_flight = candidate.longest_pass(job), min(layout.pp - stage, candidate.accumulation)
    tokens = sum(count for _, count in views)
    one_layer = sum(_layer_bytes(job, shape, candidate, length, count) for length, count in views)
    one_layer += _term_bytes(job, candidate, tokens)
    one_mome = _mome_bytes(job, candidate, tokens)
    labels = candidate.utterances(job) * job.labels * job.views_per_step
    logits = labels * shape.vocabulary / layout.tp if last else 0.0
    inputs = in_flight * tokens * shape.hidden_size * job.element_bytes / _sequence_share(candidate)
    if layout.recompute == "full":
        # Only each layer's input is kept; one layer at a time is computed again.
        activations, experts_kept = layers * inputs + one_layer, one_mome
    else:
        activations, experts_kept = layers * in_flight * one_layer, layers * in_flight * one_mome
    # What came from the stage before, what went to the next, and both ends of the model.
    activations += inputs * ((stage > 0) + (not last))
    activations += _end_bytes(job, candidate, in_flight * tokens, stage == 0, last)
    kept = activations + experts_kept + logits * FP32
    clips, own_clips = candidate.encoded(job)
    encoders = job.encoders if stage == 0 else ()
    beside = max((encoder.working_bytes(own_clips) for encoder in encoders if encoder.beside), default=0.0)
    working = beside + max(
        logits * job.element_bytes,
        _layer_working(job, shape, candidate, tokens),
        # Gradients are reduced when no activations are there, and so are clips encoded that cannot be encoded beside
        # the passes: the peak only where few are kept.
        gradients / 2 + bucket - kept,
        *(encoder.working_bytes(own_clips) - kept for encoder in encoders if not encoder.beside),
    )
    return Memory(
        frozen=frozen_bytes(job, candidate, stage),
        trained=trained,
        gradients=gradients,
        moments=moments,
        activations=activations,
        experts=experts_kept,
        logits=logits * FP32,
        # Encoders that work beside the passes hold the next step's features, too.
        encoders=sum(each.weight_bytes + (1 + each.beside) * each.feature_bytes(clips) for each in encoders),
        working=working,
        runtime=runtime,
    )


def frozen_bytes(job: Job, candidate: Candidate, stage: int) -> float:
    """Bytes of the LLM's weights on a rank: products are split over tensor-parallel ranks, norms are not."""
    layout, shape = candidate.layout, job.shape.with_padded_heads(candidate.layout.tp)
    bias = (shape.heads + 2 * shape.kv_heads) * shape.head_size * shape.qkv_bias
    each = (shape.layer_parameters + bias) / layout.tp + 2 * shape.hidden_size
    ends = (stage == 0) + (stage == layout.pp - 1)
    table = shape.vocabulary * shape.hidden_size / layout.tp
    final_norm = shape.hidden_size * (stage == layout.pp - 1)
    return job.element_bytes * (layout.stages(shape.layers)[stage] * each + ends * table + final_norm)


def _shares(candidate: Candidate) -> tuple[float, float]:
    """The part of the optimiser state of shared parameters and of experts that a rank keeps."""
    if not candidate.zero:
        return 1.0, 1.0
    layout = candidate.layout
    return 1 / layout.dp, layout.ep / layout.dp


def _sequence_share(candidate: Candidate) -> int:
    """Ranks over which the hidden states between products are split."""
    return candidate.layout.tp if candidate.layout.sequence_parallel else 1


def _layer_bytes(job: Job, shape: LLMShape, candidate: Candidate, length: int, tokens: int) -> float:
    """What autograd keeps of one frozen layer. Frozen products keep nothing: no gradient of their weights is needed."""
    e, tp = job.element_bytes, candidate.layout.tp
    heads, kv_heads, d = shape.heads / tp, shape.kv_heads / tp, shape.head_size
    norms = 2 * tokens * shape.hidden_size * FP32 / _sequence_share(candidate)  # their scaled inputs, fp32
    # Queries, keys and values after rotation. Explicit products of several groups copy all three; otherwise keys and
    # values are read where they lie beside the queries, and these are kept once more.
    copied = job.attention == "eager" and kv_heads > 1
    attended = tokens * (heads + 2 * kv_heads + (0 if copied else heads)) * d * e
    scores: float = tokens * length * heads * (FP32 + (e if e < FP32 else 0))  # softmax, and its copy for the product
    if job.attention == "sdpa":
        scores = tokens * heads * (d * e + FP32)  # output and log-sum
    if candidate.layout.recompute == "selective":
        scores = 0.0
    gated = 2 * tokens * shape.ffn_size / tp * e  # both halves of the first product
    return norms + attended + scores + gated


def _term_bytes(job: Job, candidate: Candidate, tokens: int) -> float:
    """What autograd keeps of the low-rank terms of a layer: their input, which experts beside attention keep already,
    what lies between the factors, and the factors where the products have them cast or in another order."""
    if job.terms is None:
        return 0.0
    hidden, kept = job.shape.hidden_size, job.placement == "mhsa"
    inputs = 0.0 if kept else tokens * hidden / _sequence_share(candidate)
    cast, several = job.element_bytes < FP32, len(job.terms.names) > 1
    factors = job.low_width * (hidden * cast + job.term_widths / 2 / candidate.layout.tp * (cast or several))
    return job.element_bytes * (inputs + tokens * job.low_width + factors)


def _mome_bytes(job: Job, candidate: Candidate, tokens: int) -> float:
    """What autograd keeps of one MoME module."""
    if not job.all_experts:
        return 0.0
    e, hidden, sizes = job.element_bytes, job.shape.hidden_size, job.expert_sizes
    tokens_here = tokens / _sequence_share(candidate)
    inputs = tokens_here * hidden * (e + (FP32 if e < FP32 else 0))  # and their fp32 copy for the router
    inputs += e * (tokens_here * job.form.common_kept(*sizes) + job.common_parameters)
    router = tokens_here * (3 * job.experts * FP32 + job.top_k * (INDEX + FP32))
    if candidate.dispatch == "alltoall":
        kept = min(1.0, job.capacity_factor or 1.0) * job.top_k * ROW_PADDING * tokens_here
        rows = kept * (job.expert_width + job.form.kept_of_rows(*sizes)) * e + 2 * kept * INDEX
        weights = job.experts / candidate.layout.ep * job.form.joined_of_rows(*sizes) * e
        return job.passes * (inputs + router + rows + weights + _dense_bytes(job, job.shared, tokens_here))
    return job.passes * (inputs + router + _dense_bytes(job, job.all_experts, tokens_here))


def _dense_bytes(job: Job, experts: int, tokens: float) -> float:
    """What autograd keeps of some experts that all tokens go through: values with their gates, and weights."""
    kept, joined = job.form.kept(*job.expert_sizes), job.form.joined(*job.expert_sizes)
    return job.element_bytes * experts * (tokens * (kept + 1) + joined)


def _layer_working(job: Job, shape: LLMShape, candidate: Candidate, tokens: int) -> float:
    """Gradients inside the backward pass of one layer, beside what is kept of it."""
    e, tp, hidden = job.element_bytes, candidate.layout.tp, shape.hidden_size
    feed_forward = tokens * (4 * shape.ffn_size / tp + 2 * hidden) * e
    length, of_view = candidate.longest_pass(job)[0]  # attention goes view by view
    attention = 3 * of_view * length * shape.heads / tp * FP32 if job.attention == "eager" else 0.0
    dense = job.all_experts and candidate.dispatch != "alltoall"
    kept = job.all_experts * job.form.kept(*job.expert_sizes)
    experts = tokens * (0.75 * kept * e + 2 * hidden * FP32) if dense else 0.0
    return max(feed_forward, attention, experts)


def _end_bytes(job: Job, candidate: Candidate, positions: int, first: bool, last: bool) -> float:
    """The projectors, as if all positions were speech, and the final norm."""
    projectors = positions * job.projector_values * FP32 * (first and job.projectors_train)
    return projectors + positions * job.shape.hidden_size * FP32 * last / _sequence_share(candidate)
