"""What ``mome-dist evaluate`` does: from a request to result files and a table."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mome_dist.config.derived import views_of
from mome_dist.config.schema import RunConfig
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.errors import UserError
from mome_dist.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Bootstrap
from mome_dist.evaluation.checks import asked_conditions, decoding_of
from mome_dist.evaluation.comparison import compare, read_texts, texts_of
from mome_dist.evaluation.request import EvaluationRequest, parse_views
from mome_dist.evaluation.results import ACTIVATIONS, summary_of, write_results
from mome_dist.evaluation.run import evaluate_run
from mome_dist.evaluation.tables import tables_for_terminal
from mome_dist.inference.load import LoadedRun, load_run
from mome_dist.ownership import owned
from mome_dist.parallel.plain_world import World
from mome_dist.preflight import check_geometry
from mome_dist.speech.views import streams_read
from mome_dist.text import NORMALIZER, normalize


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


def utterances_of(corpus: Corpus, split: str, limit: int | None) -> list[Utterance]:
    """The utterances to evaluate. Raises UserError for an unknown split or a split without words."""
    utterances = corpus.split(split)[:limit]
    if not any(normalize(utterance.text) for utterance in utterances):
        raise UserError(f"{corpus.directory}: split {split!r} has no word in its texts; there is nothing to score.")
    return utterances


def evaluate(request: EvaluationRequest, world: World, console: Console) -> dict[str, Any] | None:
    """Evaluate, write the results and print the table on rank 0; returns the content of ``results.json``.

    Args:
        request: that has been checked (`mome_dist.evaluation.checks.check_request`).
    """
    conditions = asked_conditions(request)
    other = None if request.compare is None else read_texts(request.compare)
    if request.device_map is not None and world.size > 1:
        raise UserError(
            f"device_map={request.device_map!r} spreads one model over the devices of one process, but there are "
            f"{world.size} processes, each with a model of its own: start one."
        )
    asked_views = None if request.rates is None else parse_views(request.rates)

    def corpus_of(config: RunConfig) -> Corpus:
        """The corpus, which must fit the encoders; both are looked at before any model is loaded."""
        corpus = Corpus.open(request.corpus or config.data.corpus)
        if "video" in streams_read(asked_views or views_of(config)):
            check_geometry(config.video_encoder.path, corpus)
        return corpus

    sections = ("llm", "audio_encoder", "video_encoder")
    frozen = {section: place for section in sections if (place := getattr(request, section)) is not None}
    untrained = None
    if "untrained" in request.baselines:
        # Only its trainable parameters are kept: two frozen LLMs would not fit where one does.
        before = load_run(
            request.checkpoint,
            world.device,
            weights=False,
            frozen=frozen,
            device_map=request.device_map,
            precision=request.precision,
            check=corpus_of,
        )
        if before.model.lora is not None:
            raise UserError(
                f"baselines=untrained: clips are encoded once, with the LoRA that {request.checkpoint} trained: leave "
                "out this baseline."
            )
        untrained = before.model.state_dict()
    run: LoadedRun = load_run(
        request.checkpoint,
        world.device,
        frozen=frozen,
        select=request.select,
        device_map=request.device_map,
        precision=request.precision,
        check=corpus_of,
    )
    out = output_directory(run, request.output)
    decoding = decoding_of(run.config.decoding, request)
    views = asked_views or list(run.views)
    split = request.split or run.config.data.test_split
    corpus = corpus_of(run.config)
    utterances = utterances_of(corpus, split, request.limit)
    evaluation = evaluate_run(
        run,
        corpus,
        utterances,
        views,
        decoding,
        world,
        conditions=conditions,
        noise_split=run.config.data.train_split,
        seed=request.seed,
        chance="chance" in request.baselines,
        untrained_state=untrained,
        console=console,
    )
    if evaluation is None:
        return None
    results = evaluation.results
    document: dict[str, Any] = {
        "run": run.config.name,
        "checkpoint": str(request.checkpoint),
        "select": request.select,
        "step": run.step,
        "corpus": corpus.manifest.get("name", corpus.directory.name),
        "split": split,
        "utterances": len(utterances),
        "speech_seconds": results[0].speech_seconds,
        "normalizer": NORMALIZER,
        "precision": run.config.llm.precision,
        "decoding": asdict(decoding),
        "seed": request.seed,
        "intervals": {"method": "percentile bootstrap over utterances", "resamples": RESAMPLES, "level": CONFIDENCE},
        "processes": world.size,
        "torch_threads": torch.get_num_threads(),
        "device": world.device.type,
        "trainable_parameters": run.model.part_sizes(),
    }
    bootstrap = Bootstrap(len(utterances), request.seed)
    views_of_results = [summary_of(result, result.case.view in run.views, bootstrap) for result in results]
    document["views"] = views_of_results
    ids, texts = [utterance.id for utterance in utterances], [utterance.text for utterance in utterances]
    if other is not None:
        compared = compare(other, texts_of(results, ids, texts), request.seed)
        document["comparison"] = {"with": str(request.compare), "views": compared}
    # The files belong together: another evaluation with the same output waits, and replaces them all.
    with owned(out, "writing results", "give another output=DIR", patience_seconds=math.inf):
        if evaluation.activations is not None:
            evaluation.activations.save(out / ACTIVATIONS)
        write_results(out, document, results, evaluation.mixtures, ids, texts)
    title = f"{document['run']}, step {document['step']}, {split}: {len(utterances)} utterances"
    for table in tables_for_terminal(title, document):
        console.print(table)
    console.print(f"Written to {out}.")
    return document
