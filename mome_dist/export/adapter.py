"""A trained run as an adapter that needs nothing else of the run (see `mome_dist.checkpoint.adapter` for its files)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mome_dist.adapters.lora import PREFIX
from mome_dist.adapters.peft import PeftAdapter, peft_adapters
from mome_dist.checkpoint.adapter import is_adapter, read_adapter, write_adapter
from mome_dist.checkpoint.deepspeed.read import is_deepspeed
from mome_dist.checkpoint.format import find_checkpoint
from mome_dist.checkpoint.reshard import reshard
from mome_dist.checkpoint.saved import Saved, read_checkpoint
from mome_dist.errors import UserError
from mome_dist.evaluation.arithmetic import mome_parameters
from mome_dist.evaluation.results import RESULTS, read_results
from mome_dist.export.model_card import model_card
from mome_dist.files import aside, published_directory
from mome_dist.hub import model_at, name_of
from mome_dist.inference.load import LoadedRun, assemble, token_identity
from mome_dist.parallel.layout import Layout
from mome_dist.paths import cache_root
from mome_dist.versions import version_of

PEFT = "peft"  # the folder of an export with what PEFT reads

# The sections of a run's configuration that describe the model and its use; the others describe its training.
_SECTIONS = ("name", "seed", "llm", "audio_encoder", "video_encoder", "projector", "mome", "task", "data", "decoding")


def load_adapter(
    directory: str | Path,
    device: torch.device | None = None,
    *,
    llm: str | Path | None = None,
    audio_encoder: str | Path | None = None,
    video_encoder: str | Path | None = None,
) -> LoadedRun:
    """Load an export in one process; its `model` decodes with transformers' ``generate``.

    Args:
        directory: of the export.
        device: CPU if not given.
        llm, audio_encoder, video_encoder: directories of the frozen models; where not given, the place that the export
            recorded, then the cache of assets.

    Raises:
        UserError: for a missing or damaged file, or a frozen model that is missing or another one.
    """
    given = {"llm": llm, "audio_encoder": audio_encoder, "video_encoder": video_encoder}
    frozen = {section: place for section, place in given.items() if place is not None}
    return assemble(read_adapter(directory), device, frozen=frozen)


def export_adapter(
    source: str | Path, target: str | Path, frozen: Mapping[str, str | Path] | None = None
) -> dict[str, Any]:
    """Write the adapter of a run.

    Nothing is written before the model has been built and filled as a user of the export will do it.

    Args:
        source: directory of a run (its newest checkpoint) or of one checkpoint.
        target: directory to make; it appears whole or not at all.
        frozen: as for `mome_dist.inference.load.load_run`.

    Returns:
        The content of ``config.json`` but for the facts about the weights.

    Raises:
        UserError: the target exists, or the run is not whole.
    """
    source, target = Path(source), Path(target)
    check_target(target)
    if is_adapter(source):
        raise UserError(f"{source} is an export already: copy the directory.")
    saved = read_checkpoint(find_checkpoint(source))
    return export_run(assemble(saved, frozen=frozen), saved, target)


def check_target(target: Path) -> None:
    """Raise UserError if there is something where an export shall be."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists, and an export replaces nothing: name another directory or remove it.")


def export_run(run: LoadedRun, saved: Saved, target: Path) -> dict[str, Any]:
    """Write a model that is filled; ``saved`` is what it was read from. Returns as `export_adapter`."""
    document = _describe(run, saved)
    card = model_card(run, document, _results(saved))
    with published_directory(target, replace=False) as directory:
        write_adapter(directory, run.model.state_dict(), document, card)
        for name, adapter in _for_peft(run).items():
            adapter.write(directory / PEFT / name, document["frozen"]["llm"]["name"])
    return document


def _for_peft(run: LoadedRun) -> dict[str, PeftAdapter]:
    """What PEFT can add to the plain LLM; nothing where experts are a part of the model, which it does not know."""
    terms = run.model.terms
    return {} if terms is None or run.model.momes else peft_adapters(run.model.state_dict(), terms)


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
    active = {"mome_active_per_token": mome_parameters(run.config.mome, hidden_size, layers).active}
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
