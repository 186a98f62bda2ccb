"""A trained run as an adapter that needs nothing else of the run (see `mome_dist.checkpoint.adapter` for its files)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mome_dist.adapters.lora import PREFIX
from mome_dist.adapters.peft import peft_adapters
from mome_dist.checkpoint.adapter import (
    CARD,
    LARGEST_SHARD,
    PEFT,
    is_adapter,
    is_current,
    read_document,
    read_weights,
    saved_of,
    write_adapter,
)
from mome_dist.checkpoint.deepspeed.read import is_deepspeed
from mome_dist.checkpoint.format import find_checkpoint
from mome_dist.checkpoint.reshard import reshard
from mome_dist.checkpoint.saved import Saved, read_checkpoint
from mome_dist.config.derived import views_of
from mome_dist.errors import UserError
from mome_dist.evaluation.arithmetic import mome_parameters
from mome_dist.evaluation.results import RESULTS, read_results
from mome_dist.export.model_card import USE, model_card, usage, with_section
from mome_dist.files import aside, check_absent, published_directory
from mome_dist.hub import model_at, name_of
from mome_dist.inference.load import LoadedRun, assemble, token_identity
from mome_dist.parallel.layout import Layout
from mome_dist.paths import cache_root
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.transformers_auto import ARCHITECTURE, MODEL_TYPE
from mome_dist.versions import version_of

# What transformers and model hubs look for.
IDENTITY = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}

# The sections of a run's configuration that describe the model and its use; the others describe its training.
_SECTIONS = ("name", "seed", "llm", "audio_encoder", "video_encoder", "projector", "mome", "task", "data", "decoding")


def export_adapter(
    source: str | Path,
    target: str | Path,
    frozen: Mapping[str, str | Path] | None = None,
    licence: str | None = None,
) -> dict[str, Any]:
    """Write the adapter of a run.

    Nothing is written before the model has been built and filled as a user of the export will do it.

    Args:
        source: directory of a run (its newest checkpoint), of one checkpoint, or of an export of before transformers
            knew them, which is written anew without building its model.
        target: directory to make; it appears whole or not at all.
        frozen: as for `mome_dist.inference.load.load_run`.
        licence: of the trained weights, for the model card, as the hub names it ("apache-2.0"); None: not known yet.

    Returns:
        The content of ``config.json`` but for the facts about the weights.

    Raises:
        UserError: the target exists, the run is not whole, the source is an export as this version writes them, or the
            licence is no identifier.
    """
    source, target = Path(source), Path(target)
    check_absent(target, "an export")
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise UserError(f"licence {licence!r} is no identifier of the hub: write such as apache-2.0 or cc-by-nc-4.0.")
    if is_adapter(source):
        return _renew(source, target)
    saved = read_checkpoint(find_checkpoint(source))
    return export_run(assemble(saved, frozen=frozen), saved, target, licence)


def export_run(run: LoadedRun, saved: Saved, target: Path, licence: str | None = None) -> dict[str, Any]:
    """Write a model that is filled; ``saved`` is what it was read from. Returns as `export_adapter`."""
    document = {**IDENTITY, **_describe(run, saved)}
    card = model_card(run, document, _results(saved), licence)
    with published_directory(target, replace=False) as directory:
        write_export(directory, run.model, document, card)
    return document


def write_export(
    directory: Path,
    model: MoMESpeechLM,
    document: Mapping[str, Any],
    card: str,
    max_shard_size: int | str = LARGEST_SHARD,
) -> None:
    """Fill an empty directory with what a model has; arguments as `mome_dist.checkpoint.adapter.write_adapter`."""
    weights = model.state_dict()
    write_adapter(directory, weights, document, card, max_shard_size)
    # What PEFT can add to the plain LLM; nothing where experts are a part of the model, which it does not know.
    if model.terms is not None and not len(model.mome):
        for name, adapter in peft_adapters(weights, model.terms).items():
            adapter.write(directory / PEFT / name, document["frozen"]["llm"]["name"])


def _renew(source: Path, target: Path) -> dict[str, Any]:
    """Write an export of before transformers knew them as one that it knows; returns as `export_adapter`."""
    old = read_document(source)
    if is_current(old):
        raise UserError(f"{source} is an export already: copy the directory.")
    weights = read_weights(source, old)
    document = {**IDENTITY, **{key: value for key, value in old.items() if key not in ("format", "weights")}}
    if any(name.startswith("tags.") for name in weights):
        document["own_tags"] = True
    if not (source / CARD).is_file():
        raise UserError(f"{source / CARD} does not exist: restore the model card from a copy, or export the run again.")
    view = views_of(saved_of(source, old, weights).config)[0]
    card = with_section((source / CARD).read_text(encoding="utf-8"), USE, usage(view))
    with published_directory(target, replace=False) as directory:
        write_adapter(directory, weights, document, card)
        if (source / PEFT).is_dir():
            shutil.copytree(source / PEFT, directory / PEFT)
    return document


def export_checkpoint(source: Path, target: Path, config: Path | None = None) -> None:
    """`export_adapter` for a checkpoint of either format; arguments and errors as in `reshard`."""
    if not is_deepspeed(source):
        export_adapter(source, target)
        return
    with aside(target) as scratch:
        reshard(source, scratch / "canonical", "canonical", Layout(1, 1, 1, 1), 1, config)
        export_adapter(scratch / "canonical", target)


def _describe(run: LoadedRun, saved: Saved) -> dict[str, Any]:
    model = run.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    hidden_size, layers = model.llm.config.hidden_size, model.llm.config.num_hidden_layers
    active = {"mome_active_per_token": mome_parameters(run.config, hidden_size, layers).active}
    if (terms := model.terms) is not None:
        each = model.part_sizes()[PREFIX] // len(terms.names)
        active[f"{PREFIX}_active_per_token"] = len(terms.kinds) * each
    return {
        "name": run.config.name,
        "step": run.step,
        "views": [str(view) for view in run.views],
        "source": {"checkpoint": saved.directory.resolve().name, "content": saved.content},
        "versions": {name: version_of(name) for name in ("mome_dist", "torch", "transformers")},
        "llm": {
            "architecture": type(model.llm).__name__,
            "hidden_size": hidden_size,
            "layers": layers,
            "vocabulary": model.llm.config.vocab_size,
            "parameters": model.llm.num_parameters(),
        },
        "parameters": {"trained": trained, **model.part_sizes(), **active},
        "frozen": {
            section: {"name": name_of(getattr(run.config, section).path), "fingerprint": fingerprint}
            for section, fingerprint in saved.frozen.items()
        },
        **({"own_tags": True} if hasattr(model, "tags") else {}),
        "tokens": token_identity(run.config, run.sequences),
        "config": _portable_config(run),
    }


def _portable_config(run: LoadedRun) -> dict[str, Any]:
    values = {name: value for name, value in asdict(run.config).items() if name in _SECTIONS}
    # Features belong to this machine's cache; an export encodes.
    values["data"]["features_dir"] = None
    for section, key in (("llm", "path"), ("audio_encoder", "path"), ("video_encoder", "path"), ("data", "corpus")):
        if values[section][key]:
            values[section][key] = _portable(Path(values[section][key]))
    return values


def _portable(path: Path) -> str:
    """A path as the YAML files write it: inside the cache relative to it, so that it holds on other machines, and a
    model of the hub by its name there."""
    if (model := model_at(path)) is not None:
        return str(model)
    path = path.absolute()
    if path.is_relative_to(cache_root()):
        inside = path.relative_to(cache_root()).as_posix()
        if re.fullmatch(r"[\w./-]+", inside):  # what OmegaConf reads without quotes
            return f"${{cache:{inside}}}"
    return str(path)


def _results(saved: Saved) -> dict[str, Any] | None:
    """Results of the evaluation of this very step, if there are any."""
    folder = saved.directory.resolve().parent
    path = folder.parent / "evaluation" / RESULTS
    if folder.name != "checkpoints" or not path.is_file():
        return None
    results = read_results(path)
    return results if results.get("step") == saved.step else None
