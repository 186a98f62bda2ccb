"""The table that a report begins with: what was trained, with what, and how far and how well it went."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mome_dist.config.derived import expert_in_words, lora_of, router_of
from mome_dist.config.schema import RunConfig, TaskConfig, TaskWeights
from mome_dist.errors import UserError
from mome_dist.evaluation.arithmetic import llm_lora_parameters, mome_parameters
from mome_dist.evaluation.run_files import RunFiles
from mome_dist.evaluation.tables import plain
from mome_dist.hub import SCHEME, directory_of
from mome_dist.llm.shape import LLMShape
from mome_dist.training_log import Ends, Floats


def summary_table(files: RunFiles) -> str:
    """The table in Markdown."""
    config, task = files.config, files.config.task
    layout = config.parallel
    rows = [
        ("frozen LLM", f"{_model(config.llm.path)}, {config.llm.precision}"),
        ("frozen encoders", ", ".join(_encoders(config)) or "-"),
        *((f"LoRA of the {stream} encoder", str(lora)) for stream, lora in lora_of(config).items()),
        *([("LoRA of the LLM", _llm_lora(files))] if config.llm.lora is not None else []),
        *_experts(files),
        ("projectors", _projectors(files)),
        *_projector_experts(files),
        ("tasks and rates", "; ".join(_rates(config))),
        ("views per step", _drawn_views(task)),
        (
            "optimiser",
            f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}, "
            f"batches of {config.data.describe_batch()}",
        ),
        ("layout", f"tensor {layout.tp}, pipeline {layout.pp}, expert {layout.ep}; {config.deepspeed.file}"),
        ("seed", str(config.seed)),
        *progress_rows(files),
    ]
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {plain(value)} |" for name, value in rows) + "\n"


def _drawn_views(task: TaskConfig) -> str:
    if task.sampling == "rates":
        drawn = "each task at one drawn audio rate and one drawn video rate"
    else:
        drawn = "all" if task.views_per_step is None else str(task.views_per_step)
    weights = [f"{name} {getattr(task.weights, name):g}" for name in task.tasks]
    return drawn if task.weights == TaskWeights() else f"{drawn}; weights {', '.join(weights)}"


def _experts(files: RunFiles) -> list[tuple[str, str]]:
    mome = files.config.mome
    if not mome.placed:
        return [("MoME", "none")]
    if not mome.experts:
        place = f"{mome.shared_experts}-{mome.placement.upper()}, {mome.expert} of width {mome.bottleneck}"
        return [("MoME", f"{place}; no router"), ("MoME parameters", _parameters(files))]
    sizes = f"{mome.routed_experts}/{mome.top_k}-{mome.placement.upper()}, {mome.shared_experts} shared"
    return [
        ("MoME", f"{sizes}, {expert_in_words(files.config)}"),
        ("router", _router(files.config)),
        ("MoME parameters", _parameters(files)),
    ]


def _encoders(config: RunConfig) -> list[str]:
    tasks, names = set(config.task.tasks), []
    if tasks & {"asr", "avsr"}:
        names.append(f"{_model(config.audio_encoder.path)} (audio, padded to {config.audio_encoder.padding})")
    if tasks & {"vsr", "avsr"}:
        names.append(f"{_model(config.video_encoder.path)} (video)")
    return names


def _model(path: str) -> str:
    """What a frozen model is called: on the hub by its name and commit there, elsewhere as its directory."""
    return path if path.startswith(SCHEME) else Path(path).name


def _rates(config: RunConfig) -> list[str]:
    task = config.task
    lists = {
        "asr": f"audio {task.asr_audio_rates}",
        "vsr": f"video {task.vsr_video_rates}",
        "avsr": f"audio {task.avsr_audio_rates} x video {task.avsr_video_rates}",
    }
    return [f"{name.upper()} {lists[name]}" for name in lists if name in task.tasks]


def _router(config: RunConfig) -> str:
    mome = config.mome
    gates = f"{mome.score} scores{', renormalised' if mome.renormalize else ''}"
    bias = f", bias rate {mome.bias_rate:g}" if mome.bias_rate else ""
    kind = str(router_of(config).settings)
    return f"{f'{kind}; ' if kind else ''}{gates}; balance loss {mome.balance_loss:g}, z-loss {mome.z_loss:g}{bias}"


def _llm_lora(files: RunFiles) -> str:
    """The low-rank terms, and counts in closed form."""
    lora = files.config.llm.lora
    try:
        shape = LLMShape.from_directory(directory_of(files.config.llm.path))
    except UserError:
        return str(lora)
    count = llm_lora_parameters(files.config, shape)
    return f"{lora}: {count.active:,} active per token, {count.total:,} trained"


def _parameters(files: RunFiles) -> str:
    """Counts in closed form, from the LLM's config.json."""
    try:
        shape = LLMShape.from_directory(directory_of(files.config.llm.path))
    except UserError:
        return f"unknown: the LLM is not at {files.config.llm.path}"
    count = mome_parameters(files.config, shape.hidden_size, shape.layers)
    return f"{count.active:,} active per token, {count.total:,} trained"


def _projectors(files: RunFiles) -> str:
    projector = files.config.projector
    sharing = "one a rate" if projector.per_rate else "shared by all rates"
    norm = "" if projector.layer_norm else ", without layer norm"
    mixture = "" if projector.mixture is None else f", {projector.mixture}"
    text = f"hidden {projector.hidden_size}, {projector.compression}, {sharing}{norm}{mixture}"
    counted = (files.results or {}).get("trainable_parameters", {}).get("projectors")
    return text if counted is None else f"{counted:,} trained; {text}"


def _projector_experts(files: RunFiles) -> list[tuple[str, str]]:
    """The share of each expert of a mixture in the latest routes of its router."""
    found = [record["projector_experts"] for record in files.log.steps if "projector_experts" in record]
    by_router: dict[str, list[str]] = {}
    for name, share in (found[-1] if found else {}).items():
        by_router.setdefault(name.partition(".")[0].replace("_", " and "), []).append(f"{share:.0%}")
    return [(f"load of the projectors of {router}", ", ".join(shares)) for router, shares in by_router.items()]


def progress_rows(files: RunFiles) -> list[tuple[str, str]]:
    """How far training has come, and its headline figures: means over a window that each names, not one step's."""
    log = files.log
    if not log.steps:
        return [("training", "not started")]
    steps, losses = log.series("loss")
    rows = [
        ("training", f"step {int(steps[-1])} of {files.config.training.steps}"),
        ("training loss", _ends(losses)),
    ]
    sinks = log.series("sink_loss")[1]
    if len(sinks):
        rows.append(("sink loss (squared cosine)", _ends(sinks)))
    at, validation = log.validation_series(None)
    if len(at):
        best, views = int(np.argmin(validation)), len(log.validations[-1]["validation"])
        rows.append(
            (
                "validation loss",
                f"{validation[-1]:.3f} at step {int(at[-1])} (the last), {validation[best]:.3f} at step "
                f"{int(at[best])} (the best): mean of {views} view{'s' if views > 1 else ''} over the split",
            )
        )
    seconds = log.series("seconds")[1]
    speeds = log.series("tokens_per_second")[1]
    if len(seconds):
        rows.append(("time in steps", f"{seconds.sum():.0f} s, {np.median(seconds):.2f} s a step (median)"))
    if len(speeds):
        rows.append(("throughput", f"{np.median(speeds):,.0f} tokens/s (median of all steps)"))
    return rows


def _ends(values: Floats) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f} in the only step"
    ends = Ends.of(values)
    return f"{ends.first:.3f} (mean of the first {ends.window}) to {ends.last:.3f} (mean of the last {ends.window})"
