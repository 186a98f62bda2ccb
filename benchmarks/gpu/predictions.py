"""What the planner expects of the measured steps: the same function when they are measured and ever after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import Sizes, configuration
from mome_dist.config.derived import streams_of, views_of
from mome_dist.config.schema import RunConfig
from mome_dist.llm.shape import LLMShape
from mome_dist.model.shared import build_sequences
from mome_dist.parallel.layout import Layout
from mome_dist.planning.encoder_shapes import encoder_shape
from mome_dist.planning.flops import step_flops
from mome_dist.planning.hardware import GPUS, known_gpu
from mome_dist.planning.job import Candidate, Clip, Job, job_of
from mome_dist.planning.measured import Check, cluster_of_record
from mome_dist.planning.memory import memory
from mome_dist.planning.speed import step_time

FORMS = ("frozen LLM", "with MoME", "with MoME and encoders")
ALONE = Candidate(Layout.for_world(1), 1, "local", 1)


def jobs(config: RunConfig, sizes: Sizes) -> dict[str, Job]:
    """The planner's view of each of `FORMS`."""
    views, sequences = views_of(config), build_sequences(config)
    streams = streams_of(config)
    prompt = sequences.overhead(views[0]) - 1 - 2 * len(streams)
    clip = Clip(sizes.seconds, sizes.text_tokens, prompt)
    widths = {stream: encoder_shape(config, stream).width for stream in streams}
    whole = job_of(config, LLMShape.from_directory(config.llm.path), clip, widths, on_gpu=True)
    mome = replace(whole, encoders=())
    return dict(zip(FORMS, (replace(mome, experts=0, shared=0, top_k=0), mome, whole), strict=True))


def predictions(sizes: Sizes, record: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds and bytes of a step of each form on the machine of a record, and the FLOPs that it needs.

    Bytes are those of tensors, as `torch.cuda.max_memory_allocated` counts them: without the context of the device.
    """
    cluster = cluster_of_record(record, "this benchmark")
    found = {}
    for form, job in jobs(configuration(sizes, folder), sizes).items():
        time, need = step_time(job, ALONE, cluster), memory(job, ALONE, 0, 0.0, cluster.reserves)
        parts = time.parts()
        if not job.experts:
            del parts["experts"]  # calls of modules that are not there
        found[form] = {
            "seconds": sum(parts.values()),
            "seconds by part": parts,
            "bytes": need.total,
            "bytes by part": need.parts(),
            "flops": step_flops(job),
        }
    return found


def step_checks(cases: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measured steps beside what was predicted of them, as `mome_dist.planning.measured.Check` has it."""
    checks = []
    for form, case in cases.items():
        checks.append(Check(f"a step, {form}", "ms", case["predicted"]["seconds"] * 1e3, case["step"]))
        if case["bytes"] is not None:
            checks.append(Check(f"tensors, {form}", "GB", case["predicted"]["bytes"] / 1e9, case["bytes"] / 1e9))
    return [asdict(check) for check in checks]


def peak_flops(record: Mapping[str, Any]) -> float | None:
    """The published peak of bf16 products of a record's GPU; None where none is known."""
    known = known_gpu(record["gpu"])
    return None if known is None else GPUS[known].bf16_flops
