"""A run as one page with figures: what was trained, how it went, how well it recognises, what its experts do.

Everything comes from the files of the run directory. What is not there yet is named, with the command that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mome_dist.checkpoint.format import newest_checkpoint
from mome_dist.config.derived import lora_of
from mome_dist.config.schema import TaskWeights
from mome_dist.evaluation.activation_plots import consistency_figure, heat_map_figure, tasks_of
from mome_dist.evaluation.condition_plots import (
    corruption_figure,
    cost_figure,
    has_corruption,
    has_noise,
    noise_figure,
)
from mome_dist.evaluation.conflict_plots import conflict_figure
from mome_dist.evaluation.lora_plots import term_norm_figure, term_norms
from mome_dist.evaluation.page import shown, write_page
from mome_dist.evaluation.plots import load_figure, loss_figure, wer_figure
from mome_dist.evaluation.routing_plots import view_agreement_figure, view_load_figure
from mome_dist.evaluation.run_files import RunFiles
from mome_dist.evaluation.run_summary import summary_table
from mome_dist.evaluation.style import save_figure
from mome_dist.evaluation.tables import clean_views, markdown_report, plain
from mome_dist.training_log import RoutingLog, imbalance, normalized_entropy


def write_report(directory: Path) -> list[Path]:
    """Write ``report/report.md`` with its figures, and the same as one HTML file, into a run directory; figures of an
    older report are replaced.

    Returns:
        The Markdown and the HTML file.

    Raises:
        UserError: not a run directory, or a damaged file.
    """
    files = RunFiles.read(directory)
    out = directory / "report"
    title = f"# {plain(files.config.name)}\n"
    sections = [title, summary_table(files), *_losses(files, out), *_recognition(files, out)]
    if files.config.llm.lora is not None:
        sections += _low_rank(files, out)
    if files.config.mome.experts:
        sections += [*_activations(files, out), *_load(files, out), *_conflicts(files, out)]
    return write_page(out, "report", files.config.name, "\n".join(sections))


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
    return ["## Training\n", shown(out, "loss.png", loss_figure(files.log), "Losses", reading)]


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
        f"Step {results['step']} ({results['select']}), {plain(results['split'])} split of {plain(results['corpus'])}: "
        f"{results['utterances']} utterances, {results['speech_seconds']:.0f} s; beams {decoding['num_beams']}, "
        f"{_limits(decoding)}, nothing sampled; texts compared in {results['normalizer']}.\n"
    )
    reading = (
        "How to read it: bars are the one trained model at every rate; coarser rates are cheaper. A "
        "bar near its chance line has not learned to use that stream."
    )
    views = results["views"]
    figures = [shown(out, "wer.png", wer_figure(clean_views(views)), "Word error rates", reading)]
    if has_noise(views):
        reading = (
            "How to read it: from right to left the noise gets louder; a line that stays low where others rise has "
            "learned to use the lips. A level line hears nothing."
        )
        figures.append(shown(out, "wer_noise.png", noise_figure(views), "Word error rates in noise", reading))
    if has_corruption(views):
        reading = "How to read it: the more a bar grows over its group at the left, the more that view rests on video."
        figures.append(shown(out, "wer_video.png", corruption_figure(views), "Word error rates, broken video", reading))
    reading = (
        "How to read it: a point is a view of the one model; down and to the left is better. A line that is level "
        "means that coarser rates save cost for nothing."
    )
    figures.append(shown(out, "wer_cost.png", cost_figure(clean_views(views)), "Word error rates by cost", reading))
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
    return [title, shown(out, "lora.png", figure, "Norms of the low-rank terms", reading)]


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
    return [*sections, "## Consistency across rates\n", shown(out, "consistency.png", figure, "Consistency", reading)]


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
    return [title, counted, shown(out, "load.png", load_figure(log), "Expert load", reading), *_views(log, out)]


def _conflicts(files: RunFiles, out: Path) -> Sequence[str]:
    title, log, every = "## Gradients of the views\n", files.conflicts, files.config.mome.conflict_every
    if log is None:
        return [title, f"No line yet: training writes one every {every} steps.\n"] if every else []
    reading = (
        f"How to read it: mean cosine over {log.lines} steps, all layers and, on the left, all experts that both views "
        "train. Near 1 two views ask for the same change, near 0 they do not meet, below 0 one undoes what the other "
        "does."
    )
    return [title, shown(out, "conflicts.png", conflict_figure(log), "Cosines between gradients", reading)]


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
    sections = [title, table, shown(out, "load_views.png", view_load_figure(log), "Expert load by view", maps)]
    if len(log.views) > 1:
        reading = (
            "How to read it: 1 means that the tokens of two views spread over the experts alike, 0 that they share no "
            "expert. Two rates of one task should agree more than two tasks."
        )
        figure = view_agreement_figure(log)
        sections.append(shown(out, "view_agreement.png", figure, "Agreement between views in training", reading))
    return sections
