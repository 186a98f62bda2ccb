"""The layouts that plans are compared on, what is measured of each, and the table of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plan_parts import Trial, measure_memory, measure_seconds, write_llama
from benchmarks.results import table
from benchmarks.step_parts import WIDTHS
from mome_dist.cluster.check import Limits, check_cluster
from mome_dist.config.schema import RunConfig
from mome_dist.files import write_json
from mome_dist.llm.shape import LLMShape
from mome_dist.parallel.forked import run_forked
from mome_dist.parallel.layout import Layout
from mome_dist.planning.hardware import CPU_KERNEL_BYTES
from mome_dist.planning.job import Candidate, Clip, job_of
from mome_dist.planning.measured import measured_cluster
from mome_dist.planning.memory import memory
from mome_dist.planning.speed import step_time

BIG = {
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
TOY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
CLIP = Clip(seconds=3.0, text_tokens=13, prompt_tokens=10)  # lengths that two tensor-parallel ranks divide
TIMEOUT = 400.0


def cases() -> list[Candidate]:
    """One to four processes, every axis, all three dispatches, with and without recomputation."""

    def case(world: int, dispatch: str, zero: int = 1, accumulation: int = 1, **axes: Any) -> Candidate:
        return Candidate(Layout.for_world(world, **axes), zero, dispatch, accumulation)

    return [
        case(1, "local"),
        case(1, "local", recompute="full"),
        case(1, "alltoall", zero=0, accumulation=2, recompute="selective"),
        case(2, "local", zero=2),
        case(2, "gather", ep=2),
        case(2, "alltoall", ep=2, recompute="full"),
        case(2, "local", tp=2),
        case(2, "local", tp=2, sequence_parallel=True, zero=0),
        case(2, "local", pp=2),
        case(2, "alltoall", pp=2, accumulation=4),
        case(4, "gather", pp=2, ep=2, accumulation=2),
        case(4, "local", tp=2, pp=2, accumulation=2),
    ]


def configuration(llm: Path, bottleneck: int, projector: int) -> RunConfig:
    """The job that is measured."""
    config = RunConfig()
    config.llm.path = str(llm)
    config.mome.routed_experts, config.mome.bottleneck, config.mome.placement = 24, bottleneck, "ffn"
    config.task.tasks, config.task.avsr_audio_rates, config.task.avsr_video_rates = ["avsr"], [4], [2, 5]
    config.projector.hidden_size, config.data.batch_size = projector, 8
    return config


def measure(rounds: int, scratch: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rates and links of this machine, and the figures of every case."""
    big = configuration(write_llama(scratch / "big", BIG), 12, 512)
    toy = configuration(write_llama(scratch / "toy", TOY), 2, 16)
    record = run_forked(check_cluster, 2, scratch, Limits(), 60, lambda _: None)[0]
    figures = []
    for candidate in cases():
        world = candidate.layout.world_size
        big.llm.precision = toy.llm.precision = precision_of(candidate)
        trial = Trial(big, candidate, CLIP)
        ranks = run_forked(measure_memory, world, trial, toy, timeout=TIMEOUT)
        seconds = run_forked(measure_seconds, world, trial, rounds, timeout=TIMEOUT)[0]
        figures.append(
            {
                "case": f"{candidate.name()}, {big.llm.precision}",
                "processes": world,
                "seconds": seconds,
                "stages": [_stage(ranks, candidate, at) for at in range(candidate.layout.pp)],
            }
        )
        print(figures[-1], flush=True)
    return {"rates": record["rates"], "links": record["links"]}, figures


def precision_of(candidate: Candidate) -> str:
    """In bf16, oneDNN compiles a kernel for every number of rows that an expert gets: 50 to 80 MB here that are in no
    tensor, and on no GPU."""
    return "fp32" if candidate.dispatch == "alltoall" else "bf16"


def add_predictions(rates: Mapping[str, Any], cores: int, figures: Sequence[dict[str, Any]], scratch: Path) -> None:
    """Put what the planner predicts beside what was measured of every case.

    Args:
        rates, figures: of the machine and of every case, as `measure` returns them; the latter are changed in place.
        cores: of the machine.
    """
    # How much memory there is decides what fits, which is not asked here.
    record = {"device": "cpu", "nodes": 1, "ranks_per_node": cores, "cores": cores, "memory_bytes": 0, **rates}
    write_json(scratch / "cluster.json", record)
    config = configuration(write_llama(scratch / "shape", BIG, weights=False), 12, 512)
    for candidate, case in zip(cases(), figures, strict=True):
        config.llm.precision = precision_of(candidate)
        assert case["case"] == f"{candidate.name()}, {config.llm.precision}", "measured for other cases"
        job = job_of(config, LLMShape.from_directory(config.llm.path), CLIP, WIDTHS, on_gpu=False)
        time = step_time(job, candidate, measured_cluster(scratch / "cluster.json", 1, candidate.layout.world_size))
        case["predicted seconds"] = time.parts() | {"total": time.total}
        for number, stage in enumerate(case["stages"]):
            need = memory(job, candidate, number, CPU_KERNEL_BYTES)
            stage.update(predicted=need.total, parts=need.parts())


def _stage(ranks: Sequence[dict[str, int]], candidate: Candidate, stage: int) -> dict[str, Any]:
    """The fullest rank of a pipeline stage."""
    layout = candidate.layout
    mine = [each for rank, each in enumerate(ranks) if layout.coordinates(rank).pp == stage]
    fullest = max(mine, key=lambda each: each["peak"] - each["baseline"])
    return {
        "baseline": fullest["baseline"],
        "measured": fullest["peak"] - fullest["baseline"],
    }


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation of two lists without equal values."""
    places = [[sorted(values).index(value) for value in values] for values in (left, right)]
    count, squares = len(left), sum((a - b) ** 2 for a, b in zip(*places, strict=True))
    return 1 - 6 * squares / (count * (count**2 - 1))


def render(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Sections of the result file."""
    rows, errors = [], []
    for case in figures:
        for number, stage in enumerate(case["stages"]):
            error = stage["predicted"] / stage["measured"] - 1
            errors.append(error)
            first = number == 0
            rows.append(
                [
                    case["case"] if first else "",
                    str(number),
                    f"{stage['measured'] / 1e6:.0f}",
                    f"{stage['predicted'] / 1e6:.0f}",
                    f"{error:+.1%}",
                    f"{case['seconds']:.2f}" if first else "",
                    f"{case['predicted seconds']['total']:.2f}" if first else "",
                ]
            )
    measured, predicted = zip(*((c["seconds"], c["predicted seconds"]["total"]) for c in figures), strict=True)
    columns = ["layout", "stage", "MB measured", "MB predicted", "error", "s a step measured", "s predicted"]
    baselines = [stage["baseline"] / 1e6 for case in figures for stage in case["stages"]]
    return [
        f"- memory: {min(errors):+.1%} to {max(errors):+.1%} of the measured peak\n"
        f"- order by speed: Spearman {spearman(measured, predicted):.3f} over {len(figures)} layouts",
        "A random Llama of 76 million parameters (width 768, 8 layers) with 24 routed experts of 12 units and "
        "a shared one beside every feed-forward network, 8 clips a step in two views, AdamW. Measured is the highest "
        "resident size that the kernel saw (VmHWM) of the fullest rank of a stage, less that of the same process "
        f"after the same steps with a model of nothing ({min(baselines):.0f} to {max(baselines):.0f} MB: Python, "
        "torch, Megatron-Core, DeepSpeed, process groups). Freed blocks go back to the system at once there; steps are "
        "timed in other processes, without that. Four processes share two cores.",
        "All-to-all runs in fp32: in bf16, oneDNN compiles a kernel for every number of rows that an expert gets, 50 "
        "to 80 MB here that are in no tensor.",
        table(columns, rows),
    ]
