"""Trained weights as they come from disk, whatever they were saved in: a checkpoint of a run, or an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mome_dist.checkpoint.format import CONFIG, CheckpointReader, sharing_of
from mome_dist.config import RunConfig
from mome_dist.config.load import load_saved_config
from mome_dist.sharing import Sharing


@dataclass(frozen=True)
class Saved:
    """What was trained, and what it belongs to. Every hash has been checked.

    Attributes:
        directory: that it was read from.
        config: of the run; the paths of frozen models are those of the machine that wrote it.
        step: optimiser steps done.
        frozen: fingerprint of each frozen model, by section of the configuration.
        tokens: identity of the tokenizer (`mome_dist.inference.load.token_identity`); None where it was not recorded.
        weights: trainable parameters and router biases, fp32, by the names of `MoMESpeechLM`.
        content: hash of the checkpoint's model and optimiser, the same whatever layout wrote it.
        sharing: how the ranks of a run share each of the weights; empty where nothing is said of ranks, as in exports.
    """

    directory: Path
    config: RunConfig
    step: int
    frozen: Mapping[str, str]
    tokens: Mapping[str, Any] | None
    weights: Mapping[str, Tensor]
    content: str
    sharing: Mapping[str, Sharing | None] = field(default_factory=dict)


def read_checkpoint(directory: Path) -> Saved:
    """Read the weights of a checkpoint (`find_checkpoint`) and check all of its files.

    Raises:
        UserError: naming a file that is missing, damaged or of another format.
    """
    with CheckpointReader(directory) as reader:
        reader.verify()
        config = load_saved_config(directory / CONFIG)
        names = {name: name.removeprefix("model/") for name in reader.names("model/")}
        weights = {short: reader.read(name) for name, short in names.items()}
        sharing = {short: sharing_of(name, reader.index["tensors"][name]) for name, short in names.items()}
        return Saved(directory, config, reader.step, reader.index["frozen"], None, weights, reader.content, sharing)
