"""Loading what was trained into one process, from a run or from an export: for decoding, evaluation and export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mome_dist.assets import ASSETS, assets_root
from mome_dist.checkpoint.format import fingerprint
from mome_dist.checkpoint.saved import Saved
from mome_dist.checkpoint.select import read_saved
from mome_dist.config import RunConfig
from mome_dist.config.derived import streams_of, views_of
from mome_dist.config.models import is_rank
from mome_dist.config.values import check_values
from mome_dist.data.encoding import load_encoder
from mome_dist.errors import UserError
from mome_dist.files import sha256_of
from mome_dist.hub import HubModel, fetch
from mome_dist.llm.hugging_face import DeviceMap
from mome_dist.llm.precision import dtype_of
from mome_dist.model.shared import build_reference, build_sequences
from mome_dist.speech.lora import LoRATerms, merge_lora
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.sequence import SequenceBuilder
from mome_dist.speech.views import View

Encoder = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class LoadedRun:
    """A trained model in one process.

    Attributes:
        model: in eval mode.
        sequences: lays out prompts for it.
        config: of the run, with the paths where the frozen models were found.
        step: optimiser steps that its weights have seen; 0 for the untrained model.
        views: that it was trained on.
        directory: of the checkpoint or export.
        device: of the projectors and encoders, and of the LLM unless a device map spreads it.
    """

    model: MoMESpeechLM
    sequences: SequenceBuilder
    config: RunConfig
    step: int
    views: list[View]
    directory: Path
    device: torch.device

    def encoders(self) -> dict[str, Encoder]:
        """The encoders by stream, frozen, with what was trained of them: raw clips (float32 [samples] or uint8
        [T, 96, 96]) to features [T, d].

        LoRA is merged into fp32 weights. bf16 ones would be rounded once more than in training, so it stays beside
        them.
        """
        encoders = {stream: load_encoder(self.config, stream, self.device) for stream in streams_of(self.config)}
        if self.model.lora is not None:
            LoRATerms(encoders).load_state_dict(self.model.lora.state_dict())
            for stream, encoder in encoders.items():
                if dtype_of(getattr(self.config, f"{stream}_encoder").precision) == torch.float32:
                    merge_lora(encoder)
                encoder.requires_grad_(False)
        return dict(encoders)


def load_run(
    path: str | Path,
    device: torch.device | None = None,
    weights: bool = True,
    frozen: Mapping[str, str | Path] | None = None,
    *,
    select: str = "latest",
    device_map: DeviceMap | None = None,
    precision: str | None = None,
    check: Callable[[RunConfig], object] = lambda config: None,
) -> LoadedRun:
    """Load a run's newest checkpoint, a given checkpoint, or an export.

    Args:
        path: directory of a run, of one checkpoint, or of an export (`mome_dist.export.adapter`).
        device: CPU if not given.
        weights: False gives the untrained model that the run started from.
        frozen: directories of frozen models ("llm", "audio_encoder", "video_encoder") that are not where the run had
            them, or models of the hub (`mome_dist.hub`); without one, the place that the run recorded, then the cache
            of assets. A model of the hub is fetched if need be, unless this process is a rank.
        select: which checkpoint of a run: "latest", "best" (lowest validation loss), or "average:N" (mean of the N
            newest); see `mome_dist.checkpoint.select`.
        device_map: where the LLM goes (`mome_dist.llm.hugging_face.load_hugging_face`); None: as the run's
            ``decoding.device_map`` has it.
        precision: of the LLM, "bf16" or "fp32"; None: as in training.
        check: is given the configuration, with the places where the frozen models were found, before any is loaded.

    Raises:
        UserError: for anything missing, damaged or mismatched, or a frozen model that is missing or another one.
    """
    saved = read_saved(path, select)
    saved.config.llm.precision = saved.config.llm.precision if precision is None else precision
    return assemble(saved, device, weights, frozen, device_map, check)


def assemble(
    saved: Saved,
    device: torch.device | None = None,
    weights: bool = True,
    frozen: Mapping[str, str | Path] | None = None,
    device_map: DeviceMap | None = None,
    check: Callable[[RunConfig], object] = lambda config: None,
) -> LoadedRun:
    """Put what was trained onto its frozen models; see `load_run`."""
    config, device, given = saved.config, device or torch.device("cpu"), frozen or {}
    check_values(config)
    for section in given.keys() - saved.frozen.keys():
        raise UserError(f"{saved.directory} was trained without {section}: leave out its directory {given[section]}.")
    for section in saved.frozen:
        getattr(config, section).path = str(_find_frozen(saved, section, given.get(section)))
    check(config)
    sequences = build_sequences(config)
    _check_tokens(saved, token_identity(config, sequences))
    encoders = {stream: load_encoder(config, stream, device) for stream in streams_of(config)}
    widths = {stream: encoder.width for stream, encoder in encoders.items()}
    device_map = config.decoding.device_map if device_map is None else device_map
    model = build_reference(config, widths, device_map, LoRATerms.of(encoders))
    if any(name.startswith("tags.") for name in saved.weights):
        model.own_tags(sequences.codec.tags)
    if weights:
        _fill(model, saved)
    if device_map is None:
        model.llm.to(device)
    step = saved.step if weights else 0
    return LoadedRun(model.to(device).eval(), sequences, config, step, views_of(config), saved.directory, device)


def token_identity(config: RunConfig, sequences: SequenceBuilder) -> dict[str, Any]:
    """What must be the same in the tokenizer of an LLM for trained weights to make sense, as JSON values.

    The fingerprint of an LLM says nothing about its tokenizer.
    """
    return {"tokenizer_sha256": sha256_of(Path(config.llm.path) / "tokenizer.json"), **sequences.fixed_ids()}


def _find_frozen(saved: Saved, section: str, given: str | Path | None) -> Path:
    """The directory of a frozen model that has the right fingerprint."""
    named = getattr(saved.config, section).path if given is None else given
    if (model := HubModel.parse(f"{section}.path", named)) is not None:
        named = fetch(f"{section}.path", model, is_rank())
    recorded = Path(named)
    places = [recorded, assets_root() / recorded.name] if given is None and model is None else [recorded]
    others = []
    for place in dict.fromkeys(places):
        if place.is_dir():
            if fingerprint(place) == saved.frozen[section]:
                return place
            others.append(place)
    fix = (
        f"name its directory with --{section.replace('_', '-')} DIR (mome_dist.evaluate: {section}=DIR, "
        f"from_pretrained: {section}_path=DIR)"
    )
    if others:
        raise UserError(f"{section}: {others[0]} is not the model that {saved.directory} was trained with; {fix}.")
    asset = ", or fetch it with `mome-dist fetch`" if recorded.name in ASSETS else ""
    raise UserError(f"{section}: {places[0]} does not exist; {fix}{asset}.")


def _check_tokens(saved: Saved, found: Mapping[str, Any]) -> None:
    for key, expected in (saved.tokens or {}).items():
        if found.get(key) != expected:
            raise UserError(
                f"llm: the tokenizer in {saved.config.llm.path} is not the one that {saved.directory} was trained with "
                f"({key} differs); name the whole directory of that LLM with --llm DIR (mome_dist.evaluate: llm=DIR, "
                "from_pretrained: llm_path=DIR)."
            )


def _fill(model: MoMESpeechLM, saved: Saved) -> None:
    """Load the trained weights, all of them and no others."""
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in saved.weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{saved.directory}: {name!r} has shape {found.get(name)}, its configuration asks "
                f"{expected.get(name)} (None: no such tensor); it is damaged, use another copy."
            )
    model.load_state_dict(dict(saved.weights))
