"""Every layout that a cluster allows for a job: what fits, how fast it is, and why the others are out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mome_dist.errors import UserError
from mome_dist.llm.division import check_division
from mome_dist.parallel.layout import Layout, divisors
from mome_dist.planning.hardware import Cluster
from mome_dist.planning.job import Candidate, Job, dispatches
from mome_dist.planning.memory import Memory, memory
from mome_dist.planning.speed import StepTime, step_time

ZERO_STAGES = (0, 1, 2)
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """A candidate with its predictions.

    Attributes:
        candidate: the layout and settings.
        memory: of the fullest rank.
        stage: pipeline stage of that rank.
        time: of a step.
    """

    candidate: Candidate
    memory: Memory
    stage: int
    time: StepTime


@dataclass(frozen=True)
class Rejection:
    """Candidates that are out for the same reason.

    Attributes:
        reason: in words.
        count: candidates.
        example: one of them, the one that came nearest where that has a meaning.
    """

    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class Search:
    """What a search found: plans, fastest first, and rejections."""

    plans: tuple[Plan, ...]
    rejections: tuple[Rejection, ...]


def predict(job: Job, candidate: Candidate, cluster: Cluster) -> Plan:
    """Memory of the fullest rank, and the time of a step."""
    stage, need = _fullest(job, candidate, cluster)
    return Plan(candidate, need, stage, step_time(job, candidate, cluster))


def stage_memory(job: Job, candidate: Candidate, cluster: Cluster, stage: int) -> Memory:
    """Memory of a rank of one pipeline stage."""
    return memory(job, candidate, stage, cluster.runtime, cluster.reserves)


def _fullest(job: Job, candidate: Candidate, cluster: Cluster) -> tuple[int, Memory]:
    """The first stage keeps most activations, the last one has the logits; those between have less than the first."""
    ends = {stage: stage_memory(job, candidate, cluster, stage) for stage in (0, candidate.layout.pp - 1)}
    return max(ends.items(), key=lambda end: end[1].total)


def search(job: Job, cluster: Cluster) -> Search:
    """Try all divisions of the cluster's ranks.

    Raises:
        UserError: if nothing fits; the message says what comes nearest.
    """
    plans: list[Plan] = []
    found: dict[str, Rejection] = {}
    nearest: tuple[Candidate, Memory] | None = None
    too_large = 0

    def reject(reason: str, example: str) -> None:
        known = found.get(reason)
        found[reason] = Rejection(reason, known.count + 1 if known else 1, known.example if known else example)

    for layout, problem in _layouts(job, cluster):
        if isinstance(layout, str):
            reject(problem, layout)
            continue
        candidates = list(_candidates(job, layout))
        if not candidates:
            reject(
                f"a batch of {job.batch_size} utterances cannot be divided over {layout.dp} data-parallel ranks",
                layout.describe(),
            )
        for candidate in candidates:
            stage, need = _fullest(job, candidate, cluster)
            if need.total <= cluster.memory:
                plans.append(Plan(candidate, need, stage, step_time(job, candidate, cluster)))
                continue
            too_large += 1
            if nearest is None or need.total < nearest[1].total:
                nearest = candidate, need
    rejections = sorted(found.values(), key=lambda rejection: -rejection.count)
    if nearest is not None:
        reason = f"needs more than the {cluster.memory / 1e9:.1f} GB that a rank may use"
        example = f"{nearest[0].name()}: {nearest[1].total / 1e9:.1f} GB"
        rejections.insert(0, Rejection(reason, too_large, example))
    if not plans:
        reasons = "; ".join(f"{r.reason} ({r.example})" for r in rejections[:3])
        raise UserError(f"no layout of {cluster.name} fits: {reasons}.")
    return Search(tuple(sorted(plans, key=_rank)), tuple(rejections))


def _rank(plan: Plan) -> tuple[float, float, int]:
    """Fastest first; of equally fast ones, what needs less memory, and no more ZeRO than it takes."""
    return round(plan.time.total, 5), plan.memory.total, plan.candidate.zero


def _layouts(job: Job, cluster: Cluster) -> Iterator[tuple[Layout | str, str]]:
    """(layout, "") or (what was tried, why not)."""
    world = cluster.ranks
    # Fused attention keeps next to nothing that selective recomputation could save.
    recompute_ways = [way for way in RECOMPUTE if way != "selective" or job.attention == "eager"]
    for tp in divisors(world):
        if tp > cluster.ranks_per_node:
            yield f"tp{tp}", f"tensor parallelism beyond the {cluster.ranks_per_node} ranks of a node"
            continue
        for pp in divisors(world // tp):
            if job.shape.layers % pp:
                yield f"tp{tp} pp{pp}", f"pp does not divide the LLM's {job.shape.layers} layers evenly"
                continue
            for ep in divisors(world // tp // pp) if job.spread else (1,):  # nothing else is spread so
                for split in (False, True) if tp > 1 else (False,):
                    for recompute in recompute_ways:
                        layout = Layout.for_world(world, tp, pp, ep, sequence_parallel=split, recompute=recompute)
                        try:
                            check_division(job.shape, layout, job.spread, job.pad_heads)
                        except UserError as error:
                            yield f"tp{tp} pp{pp} ep{ep}", _why(str(error))
                        else:
                            yield layout, ""


def _why(message: str) -> str:
    """The statement of a `UserError` without the advice."""
    return message.partition(":")[0].rstrip(".")


def _candidates(job: Job, layout: Layout) -> Iterator[Candidate]:
    stages = ZERO_STAGES if layout.dp > 1 else ZERO_STAGES[:2]
    for accumulation in job.accumulations(layout.dp):
        for dispatch in dispatches(layout, job.spread, job.router, job.expert):
            for zero in stages:
                yield Candidate(layout, zero, dispatch, accumulation)
