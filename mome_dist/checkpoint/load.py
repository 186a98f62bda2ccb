"""Loading a run into one process: for decoding, evaluation, transcription and export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mome_dist.build import build_reference, build_sequences
from mome_dist.checkpoint.format import CONFIG, CheckpointReader, find_checkpoint, fingerprint
from mome_dist.config import RunConfig
from mome_dist.config.load import load_saved_config
from mome_dist.config.validate import streams_of, views_of
from mome_dist.data.encoding import load_encoder
from mome_dist.errors import UserError
from mome_dist.llm.directory import check_directory
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
        config: of the run.
        step: optimiser steps that its weights have seen; 0 for the untrained model.
        views: that it was trained on.
        directory: of the checkpoint.
        device: of the model.
    """

    model: MoMESpeechLM
    sequences: SequenceBuilder
    config: RunConfig
    step: int
    views: list[View]
    directory: Path
    device: torch.device

    def encoders(self) -> dict[str, Encoder]:
        """The frozen encoders by stream: raw clips (float32 [samples] or uint8 [T, 96, 96]) to features [T, d]."""
        return {stream: load_encoder(self.config, stream, self.device) for stream in streams_of(self.config)}


def load_run(path: str | Path, device: torch.device | None = None, weights: bool = True) -> LoadedRun:
    """Load a run's newest checkpoint, or a given one.

    Args:
        path: directory of a run or of one checkpoint.
        device: CPU if not given.
        weights: False gives the untrained model that the run started from.

    Raises:
        UserError: for a missing, damaged or mismatched checkpoint, or a frozen model that is missing or another one.
    """
    directory = find_checkpoint(path)
    config = load_saved_config(directory / CONFIG)
    check_directory(config.llm.path)  # a clear error if the frozen LLM is not here
    device = device or torch.device("cpu")
    with CheckpointReader(directory) as reader:
        reader.verify()
        for name, expected in reader.index["frozen"].items():
            if fingerprint(getattr(config, name).path) != expected:
                raise UserError(
                    f"{name}.path={getattr(config, name).path} is not the model that {directory} was trained with."
                )
        widths = {stream: load_encoder(config, stream, device).width for stream in streams_of(config)}
        model = build_reference(config, widths)
        if weights:
            names = {name.removeprefix("model/") for name in reader.names("model/")}
            if names != set(model.state_dict()):
                raise UserError(
                    f"{directory} holds other tensors than its config.yaml asks; the checkpoint is damaged."
                )
            model.load_state_dict({name: reader.read(f"model/{name}") for name in names})
        step = reader.step if weights else 0
    model.llm.to(device)
    return LoadedRun(
        model.to(device).eval(), build_sequences(config), config, step, views_of(config), directory, device
    )
