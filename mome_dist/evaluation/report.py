"""A run as one Markdown page with figures: what was trained, how it went, how well it recognises, what its experts do.

Everything comes from the files of the run directory. What is not there yet is named, with the command that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mome_dist.checkpoint.format import CONFIG, newest_checkpoint
from mome_dist.config.derived import lora_of, router_of
from mome_dist.config.load import load_saved_config
from mome_dist.config.schema import RunConfig, TaskConfig, TaskWeights
from mome_dist.errors import UserError
from mome_dist.evaluation.activation_plots import consistency_figure, heat_map_figure, tasks_of
from mome_dist.evaluation.activations import Activations
from mome_dist.evaluation.arithmetic import llm_lora_parameters, mome_parameters
from mome_dist.evaluation.condition_plots import (
    corruption_figure,
    cost_figure,
    has_corruption,
    has_noise,
    noise_figure,
)
from mome_dist.evaluation.lora_plots import term_norm_figure, term_norms
from mome_dist.evaluation.plots import load_figure, loss_figure, wer_figure
from mome_dist.evaluation.results import ACTIVATIONS, RESULTS, read_results
from mome_dist.evaluation.routing_plots import view_agreement_figure, view_load_figure
from mome_dist.evaluation.style import save_figure
from mome_dist.evaluation.tables import clean_views, markdown_report
from mome_dist.files import write_text
from mome_dist.hub import SCHEME, directory_of
from mome_dist.llm.shape import LLMShape
from mome_dist.training_log import RoutingLog, TrainingLog, imbalance, normalized_entropy

REPORT = "report.md"


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds; None for what is not there (yet)."""

    directory: Path
    config: RunConfig
    log: TrainingLog
    routing: RoutingLog | None
    results: Mapping[str, Any] | None
    activations: Activations | None

    @classmethod
    def read(cls, directory: Path) -> RunFiles:
        """Read a run directory. Raises UserError if it is none, or a file in it is damaged."""
        checkpoint = newest_checkpoint(directory)
        config = directory / CONFIG if (directory / CONFIG).is_file() or checkpoint is None else checkpoint / CONFIG
        if not config.is_file():
            raise UserError(
                f"run={directory}: no {CONFIG} and no checkpoint there; give the directory of a run, such as "
                "runs/quickstart."
            )
        evaluation = directory / "evaluation"
        results, activations = evaluation / RESULTS, evaluation / ACTIVATIONS
        return cls(
            directory,
            load_saved_config(config),
            TrainingLog.read(directory / "metrics.jsonl"),
            RoutingLog.read(directory / "routing.jsonl"),
            read_results(results) if results.is_file() else None,
            Activations.load(activations) if activations.is_file() else None,
        )


def write_report(directory: Path) -> Path:
    """Write ``report/report.md`` and its figures into a run directory; figures of an older report are replaced.

    Raises:
        UserError: not a run directory, or a damaged file.
    """
    files = RunFiles.read(directory)
    out = directory / "report"
    sections = [f"# {files.config.name}\n", _summary(files), *_losses(files, out), *_recognition(files, out)]
    if files.config.llm.lora is not None:
        sections += _low_rank(files, out)
    if files.config.mome.experts:
        sections += [*_activations(files, out), *_load(files, out)]
    write_text(out / REPORT, "\n".join(sections))
    return out / REPORT


def _summary(files: RunFiles) -> str:
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
        *_progress(files),
    ]
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows) + "\n"


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
        ("MoME", f"{sizes}, {mome.expert} {mome.bottleneck}"),
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


def _progress(files: RunFiles) -> list[tuple[str, str]]:
    log = files.log
    if not log.steps:
        return [("training", "not started")]
    steps, losses = log.series("loss")
    rows = [
        (
            "training",
            f"step {int(steps[-1])} of {files.config.training.steps}, loss {losses[0]:.3f} to {losses[-1]:.3f}",
        )
    ]
    seconds = log.series("seconds")[1]
    speeds = log.series("tokens_per_second")[1]
    if len(seconds):
        rows.append(("time in steps", f"{seconds.sum():.0f} s, {np.median(seconds):.2f} s a step (median)"))
    if len(speeds):
        rows.append(("throughput", f"{np.median(speeds):,.0f} tokens/s (median)"))
    at, validation = log.validation_series(None)
    if len(at):
        best = int(np.argmin(validation))
        rows.append(
            (
                "validation loss",
                f"{validation[-1]:.3f} at the end, {validation[best]:.3f} at step {int(at[best])} (best)",
            )
        )
    return rows


def _figure(out: Path, name: str, figure: Any, title: str, reading: str) -> str:
    save_figure(figure, out / name)
    return f"![{title}]({name})\n\n{reading}\n"


def _losses(files: RunFiles, out: Path) -> Sequence[str]:
    if not files.log.steps:
        return ["## Training\n", "No `metrics.jsonl` in the run yet: train it with `mome-dist train`.\n"]
    reading = (
        "How to read it: cross-entropy on text and end tokens, on a logarithmic axis; a dot far above its line is "
        "overfitting, a view whose line lies above the others is the hard one."
    )
    task = files.config.task
    if task.sampling == "rates" or task.weights != TaskWeights():
        reading += " Of all views together, the line is the weighted mean of each step, the dots are the plain mean."
    return ["## Training\n", _figure(out, "loss.png", loss_figure(files.log), "Losses", reading)]


def _evaluate_command(files: RunFiles) -> str:
    # Features of an encoder that trained are not those of the model before training.
    baselines = "chance" if lora_of(files.config) else "chance,untrained"
    return f"`mome-dist evaluate {files.directory} baselines=[{baselines}]`"


def _recognition(files: RunFiles, out: Path) -> Sequence[str]:
    if files.results is None:
        return ["## Word error rates\n", f"Not evaluated yet: run {_evaluate_command(files)}.\n"]
    results = files.results
    decoding = results["decoding"]
    text = (
        f"Step {results['step']} ({results['select']}), {results['split']} split of {results['corpus']}: "
        f"{results['utterances']} utterances, {results['speech_seconds']:.0f} s; beams {decoding['num_beams']}, "
        f"{_limits(decoding)}, nothing sampled; texts compared in {results['normalizer']}.\n"
    )
    reading = (
        "How to read it: bars are the one trained model at every rate; coarser rates are cheaper. A "
        "bar near its chance line has not learned to use that stream."
    )
    views = results["views"]
    figures = [_figure(out, "wer.png", wer_figure(clean_views(views)), "Word error rates", reading)]
    if has_noise(views):
        reading = (
            "How to read it: from right to left the noise gets louder; a line that stays low where others rise has "
            "learned to use the lips. A level line hears nothing."
        )
        figures.append(_figure(out, "wer_noise.png", noise_figure(views), "Word error rates in noise", reading))
    if has_corruption(views):
        reading = "How to read it: the more a bar grows over its group at the left, the more that view rests on video."
        figures.append(
            _figure(out, "wer_video.png", corruption_figure(views), "Word error rates, broken video", reading)
        )
    reading = (
        "How to read it: a point is a view of the one model; down and to the left is better. A line that is level "
        "means that coarser rates save cost for nothing."
    )
    figures.append(_figure(out, "wer_cost.png", cost_figure(clean_views(views)), "Word error rates by cost", reading))
    return ["## Word error rates\n", text, markdown_report(results), *figures]


def _limits(decoding: Mapping[str, Any]) -> str:
    limits = []
    if decoding["max_new_tokens"] is not None:
        limits.append(f"at most {decoding['max_new_tokens']} new tokens")
    if decoding["tokens_per_second"] is not None:
        limits.append(f"{decoding['tokens_per_second']:g} for a second of speech and a few more")
    return " and ".join(limits)


def _low_rank(files: RunFiles, out: Path) -> Sequence[str]:
    title, checkpoint = "## LoRA of the LLM\n", newest_checkpoint(files.directory)
    if checkpoint is None or files.config.llm.lora is None:
        return [title, "No checkpoint in the run yet: training writes it.\n"]
    figure = term_norm_figure(term_norms(checkpoint, files.config.llm.lora.scale))
    reading = (
        f"How to read it ({checkpoint.name}): how much each term adds to the weights of a layer, as a Frobenius norm. "
        "Layers at zero have learned nothing; where a view's own term stays far below the shared one, the views differ "
        "little there."
    )
    return [title, _figure(out, "lora.png", figure, "Norms of the low-rank terms", reading)]


def _activations(files: RunFiles, out: Path) -> Sequence[str]:
    if files.activations is None:
        return ["## Expert activations\n", f"Not recorded yet: run {_evaluate_command(files)}.\n"]
    activations = files.activations
    sections = [
        "## Expert activations\n",
        "Choices of the shared router on the speech and prompt tokens of the evaluated utterances. How to read the "
        "maps: a row is an LLM layer, a column of cells an expert; dark cells are experts that most tokens of that "
        "modality choose. Maps that look alike from rate to rate mean that the router knows a sound at any "
        "compression.\n",
    ]
    for task in tasks_of(activations):
        figure = heat_map_figure(activations, task)
        save_figure(figure, out / f"activations_{task}.png")
        sections.append(f"![Expert activations, {task.upper()}](activations_{task}.png)\n")
    reading = (
        "How to read it: 1 means that two kinds of tokens spread over the experts alike, 0 that they share none. Rate "
        "against rate should lie well above the dashed line, which compares audio with video."
    )
    figure = consistency_figure(activations)
    return [*sections, "## Consistency across rates\n", _figure(out, "consistency.png", figure, "Consistency", reading)]


def _load(files: RunFiles, out: Path) -> Sequence[str]:
    title, log = "## Expert load\n", files.routing
    if log is None:
        return [title, "No `routing.jsonl` in the run yet: training writes it.\n"]
    asked, dropped = log.asked.sum(), log.dropped.sum()
    share = 100 * (1 - log.tokens.sum() / max(log.positions.sum(), 1))
    counted = (
        f"Training routed {log.tokens.sum():,.0f} tokens in every layer; {share:.1f} % of all positions were padding, "
        f"which goes to no routed expert; {100 * dropped / max(asked, 1):.2f} % of the routes were dropped.\n"
    )
    reading = (
        "How to read it: 1 on the left and in the middle is perfect balance; one expert doing everything would be the "
        "number of experts on the left and 0 in the middle. Dropped routes are those beyond an expert's capacity in "
        "training; evaluation never drops."
    )
    return [title, counted, _figure(out, "load.png", load_figure(log), "Expert load", reading), *_views(log, out)]


def _views(log: RoutingLog, out: Path) -> Sequence[str]:
    title = "## Expert load by view\n"
    if not log.views:
        return [title, "Nothing yet: training counts by view from checkpoint to checkpoint.\n"]
    tokens, routes = log.tokens_by_view, np.maximum(log.asked_by_view.sum(axis=(1, 2)), 1)
    rows = zip(
        log.views,
        tokens,
        100 * (1 - tokens / np.maximum(log.positions_by_view, 1)),
        100 * log.dropped_by_view.sum(axis=(1, 2)) / routes,
        imbalance(log.asked_by_view).mean(axis=-1),
        normalized_entropy(log.asked_by_view).mean(axis=-1),
        strict=True,
    )
    table = "| view | tokens | padding % | dropped % | busiest / mean | entropy / log E |\n"
    table += "| --- | --: | --: | --: | --: | --: |\n"
    for view, count, padding, lost, busiest, entropy in rows:
        table += f"| {view} | {count:,.0f} | {padding:.1f} | {lost:.2f} | {busiest:.2f} | {entropy:.3f} |\n"
    maps = "How to read it: a row is an LLM layer, a column of cells an expert; 1 is an even share of a view's routes."
    sections = [title, table, _figure(out, "load_views.png", view_load_figure(log), "Expert load by view", maps)]
    if len(log.views) > 1:
        reading = (
            "How to read it: 1 means that the tokens of two views spread over the experts alike, 0 that they share no "
            "expert. Two rates of one task should agree more than two tasks."
        )
        figure = view_agreement_figure(log)
        sections.append(_figure(out, "view_agreement.png", figure, "Agreement between views in training", reading))
    return sections
