"""The front matter of a model card, as the Hugging Face hub reads it (https://huggingface.co/docs/hub/model-cards)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mome_dist.assets import ASSETS
from mome_dist.evaluation.published import corpus_of
from mome_dist.evaluation.tables import clean_views
from mome_dist.hub import model_at, model_card_data
from mome_dist.inference.load import LoadedRun

if TYPE_CHECKING:
    from mome_dist.hub import ModelCardData

TASK = "automatic-speech-recognition"
UNKNOWN_LICENCE = "unknown"  # the hub's word; whoever publishes an export gives it one
TASKS = {"asr": "speech to text", "vsr": "lips to text", "avsr": "speech and lips to text"}


def card_data(
    run: LoadedRun, document: Mapping[str, Any], results: Mapping[str, Any] | None, licence: str | None = None
) -> ModelCardData:
    """What the hub lists an export under, with its word error rates.

    Args:
        run: what is exported.
        document: the content of the export's ``config.json``.
        results: an evaluation of the same weights (``results.json``), or None.
        licence: of the trained weights, as the hub names it ("apache-2.0"); None says that it is unknown.
    """
    corpus = _dataset(Path(run.config.data.corpus).name)
    bases = _base_models(run, document)
    return model_card_data(
        [] if results is None else _eval_results(results),
        library_name="mome_dist",
        pipeline_tag=TASK,
        license=licence or UNKNOWN_LICENCE,
        tags=["mome", "adapter"] if run.config.mome.experts else ["adapter"],
        base_model=bases or None,
        base_model_relation="adapter" if bases else None,
        datasets=[corpus] if corpus is not None else None,
        metrics=None if results is None else ["wer"],
        model_name=None if results is None else str(document["name"]),
    )


def _base_models(run: LoadedRun, document: Mapping[str, Any]) -> list[str]:
    """The frozen models that the hub knows: fetched from it, or made of a package's copy of one."""
    found = []
    for section in document["frozen"]:
        directory = Path(getattr(run.config, section).path)
        model, asset = model_at(directory), ASSETS.get(directory.name)
        if model is not None:
            found.append(model.repository)
        elif asset is not None and asset.upstream is not None:
            found.append(asset.upstream)
    return found


def _dataset(corpus: str) -> str | None:
    """The hub's word for a corpus; None for one that is the user's own or was made here."""
    return corpus.lower() if corpus_of(corpus) is not None else None


def _eval_results(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The word error rate of every view, without noise where it was measured without."""
    corpus = str(results["corpus"])
    return [
        {
            "task_type": TASK,
            "task_name": f"{TASKS[view['task']]}, {view['view']}",
            "dataset_type": _dataset(corpus) or corpus,
            "dataset_name": corpus_of(corpus) or corpus,
            "dataset_split": str(results["split"]),
            "metric_type": "wer",
            "metric_name": "word error rate, %" + ("" if view["condition"] == "clean" else f", {view['condition']}"),
            "metric_value": round(float(view["wer"]), 2),
        }
        for view in clean_views(results["views"])
    ]
