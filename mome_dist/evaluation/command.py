"""What ``python -m mome_dist.evaluate`` does: from a request to result files and a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mome_dist.checkpoint.load import LoadedRun, load_run
from mome_dist.config.schema import DecodingConfig
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.errors import UserError
from mome_dist.evaluation.request import EvaluationRequest, check_baselines, parse_views
from mome_dist.evaluation.results import ACTIVATIONS, rich_table, summary_of, write_results
from mome_dist.evaluation.run import evaluate_run
from mome_dist.evaluation.wer import NORMALIZER, normalize
from mome_dist.evaluation.world import World


def output_directory(run: LoadedRun, output: str | None) -> Path:
    """Where results go: ``output``, or ``evaluation/`` in the directory of the run.

    Raises:
        UserError: the checkpoint lies outside a run directory and no ``output`` is given.
    """
    if output:
        return Path(output)
    directory = run.directory.resolve().parent.parent
    if run.directory.resolve().parent.name != "checkpoints":
        raise UserError(f"checkpoint={run.directory} is not in a run directory; say with output=DIR where results go.")
    return directory / "evaluation"


def decoding_of(config: DecodingConfig, request: EvaluationRequest) -> DecodingConfig:
    """The run's decoding settings with those of the request over them."""
    asked = {key: getattr(request, key) for key in ("num_beams", "max_new_tokens", "batch_size")}
    for key, value in asked.items():
        if value is not None and value < 1:
            raise UserError(f"{key}={value} must be at least 1.")
    return replace(config, **{key: value for key, value in asked.items() if value is not None})


def utterances_of(corpus: Corpus, split: str, limit: int | None) -> list[Utterance]:
    """The utterances to evaluate. Raises UserError for an unknown split, a bad limit or a split without words."""
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1.")
    utterances = corpus.split(split)[:limit]
    if not any(normalize(utterance.text) for utterance in utterances):
        raise UserError(f"{corpus.directory}: split {split!r} has no word in its texts; there is nothing to score.")
    return utterances


def evaluate(request: EvaluationRequest, world: World, console: Console) -> dict[str, Any] | None:
    """Evaluate, write the results and print the table on rank 0; returns the header and views of ``results.json``."""
    if not request.checkpoint:
        raise UserError("checkpoint is missing: give checkpoint=DIR: a run, one checkpoint of it, or an export.")
    check_baselines(request.baselines)
    asked_views = None if request.rates is None else parse_views(request.rates)
    sections = ("llm", "audio_encoder", "video_encoder")
    frozen = {section: place for section in sections if (place := getattr(request, section)) is not None}
    untrained = None
    if "untrained" in request.baselines:
        # Only its trainable parameters are kept: two frozen LLMs would not fit where one does.
        untrained = load_run(request.checkpoint, world.device, weights=False, frozen=frozen).model.state_dict()
    run: LoadedRun = load_run(request.checkpoint, world.device, frozen=frozen)
    out = output_directory(run, request.output)
    decoding = decoding_of(run.config.decoding, request)
    views = asked_views or list(run.views)
    split = request.split or run.config.data.test_split
    corpus = Corpus.open(request.corpus or run.config.data.corpus)
    utterances = utterances_of(corpus, split, request.limit)
    outcome = evaluate_run(
        run,
        corpus,
        utterances,
        views,
        decoding,
        world,
        chance_seed=request.seed if "chance" in request.baselines else None,
        untrained_state=untrained,
        console=console,
    )
    if outcome is None:
        return None
    results, activations = outcome
    header = {
        "run": run.config.name,
        "checkpoint": str(request.checkpoint),
        "step": run.step,
        "corpus": corpus.manifest.get("name", corpus.directory.name),
        "split": split,
        "utterances": len(utterances),
        "speech_seconds": results[0].speech_seconds,
        "normalizer": NORMALIZER,
        "decoding": {key: getattr(decoding, key) for key in ("num_beams", "max_new_tokens", "batch_size")},
        "chance_seed": request.seed,
        "processes": world.size,
        "torch_threads": torch.get_num_threads(),
        "device": world.device.type,
        "trainable_parameters": {
            "mome": sum(parameter.numel() for parameter in run.model.mome.parameters()),
            "projectors": sum(parameter.numel() for parameter in run.model.projectors.parameters()),
        },
    }
    summaries = [summary_of(result, result.view in run.views) for result in results]
    activations.save(out / ACTIVATIONS)
    texts = [utterance.text for utterance in utterances]
    write_results(out, header, summaries, results, [utterance.id for utterance in utterances], texts)
    console.print(rich_table(f"{header['run']}, step {run.step}, {split}: {len(utterances)} utterances", summaries))
    console.print(f"Written to {out}.")
    return {**header, "views": summaries}
