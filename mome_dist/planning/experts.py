"""What one MoME module costs on one rank by its dispatch, from bytes, FLOPs and calls.

A run with `mome.dispatch=auto` measures at its start and does not ask this; a plan is for machines that are not there.
Constants are passes over memory beside the products, forward and backward, and operations called whatever the sizes:
counted from the code (a test counts them again), passes of rows then adjusted so that the cheaper dispatch is the one
that ``benchmarks/results/moe_layer_bf16.md`` measured to be. Experts lie in one tensor and are one product, so that no
number of calls grows with them; only where a grouped product is a loop inside torch does each group cost.
"""

from __future__ import annotations

from mome_dist.planning.hardware import Cluster
from mome_dist.planning.job import Candidate, Job

FP32, PRODUCTS = 4, 3  # bytes; forward, and the gradients of input and weight
KEPT_PASSES, WEIGHT_PASSES, ROW_PASSES, HIDDEN_PASSES = 1.5, 4.0, 18.0, 6.0
DENSE_CALLS, ROW_CALLS = 67, 116
GROUP_CALLS = 20  # of a group, where it is not one of many in a kernel: six products, their slices and copies
# Of the rate of wide products: what products with one expert's few units reach.
NARROW_SHARE = 0.3


def expert_seconds(job: Job, candidate: Candidate, cluster: Cluster, tokens: float) -> float:
    """Seconds of a MoME module for a microbatch of ``tokens``, forward and backward."""
    if not job.all_experts:
        return 0.0
    layout, hidden, e = candidate.layout, job.shape.hidden_size, job.element_bytes
    tokens /= layout.tp if layout.sequence_parallel else 1
    router = PRODUCTS * 2 * tokens * job.router.outputs(job.experts) / job.passes * hidden / cluster.fp32_flops
    passes = HIDDEN_PASSES * tokens * hidden * e / cluster.memory_bytes
    common = router + passes + PRODUCTS * 2 * tokens * job.common_parameters / cluster.flops(job.precision)
    work = _row_seconds if candidate.dispatch == "alltoall" else _dense_seconds
    return job.passes * (common + work(job, candidate, cluster, tokens))


def _flops(job: Job, rows: float) -> float:
    """Forward and backward of one expert for each of some rows."""
    return PRODUCTS * 2 * rows * job.form.macs(*job.expert_sizes)


def _dense_seconds(job: Job, candidate: Candidate, cluster: Cluster, tokens: float) -> float:
    """All experts for every token of the rank, with weights that are gathered or here."""
    ep, e = candidate.layout.ep, job.element_bytes
    weights = job.all_experts * job.expert_parameters
    moved = (
        KEPT_PASSES * tokens * job.all_experts * job.form.kept(*job.expert_sizes) * e + WEIGHT_PASSES * FP32 * weights
    )
    work = _flops(job, tokens * job.all_experts) / cluster.flops(job.precision)
    work += moved / cluster.memory_bytes + DENSE_CALLS * cluster.call
    if ep == 1:
        return work
    link = cluster.link(candidate.layout.tp * ep)
    # Gathered in the precision of the hidden states, reduced in fp32, beside the frozen layer.
    travel = job.experts * job.expert_parameters * (e + FP32) * (ep - 1) / ep / link.bytes_per_second
    beside = 4 * tokens * job.shape.layer_parameters / candidate.layout.tp / cluster.flops(job.precision)
    return work + max(0.0, travel - beside) + 2 * link.latency


def _row_seconds(job: Job, candidate: Candidate, cluster: Cluster, tokens: float) -> float:
    """The chosen experts only, for tokens that are sorted by expert and travel."""
    ep, e, width = candidate.layout.ep, job.element_bytes, job.expert_width
    rows = tokens * job.top_k * min(1.0, job.capacity_factor or 1.0)
    work = _flops(job, rows) / (NARROW_SHARE * cluster.flops(job.precision))
    work += _flops(job, tokens * job.shared) / cluster.flops(job.precision)
    moved = ROW_PASSES * rows * width * e + WEIGHT_PASSES * FP32 * job.experts / ep * job.expert_parameters
    grouped = cluster.grouped_products and job.precision == "bf16"
    calls = ROW_CALLS + (0 if grouped else GROUP_CALLS * job.experts / ep)
    work += moved / cluster.memory_bytes + calls * cluster.call
    if ep == 1:
        return work
    link = cluster.link(candidate.layout.tp * ep)
    # There and back, forward and backward.
    return work + 4 * rows * width * e * (ep - 1) / ep / link.bytes_per_second + 4 * link.latency
