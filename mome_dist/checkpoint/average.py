"""The element-wise mean of checkpoints: one set of weights that is often better than each of the last ones.

Sums are in fp64, so that the order does not matter and the mean of equal weights is these weights. The result has no
optimiser: it is for decoding, for an export, or for `training.init_from`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mome_dist.checkpoint.format import CONFIG, Part, complete, describe_part, file_facts, index_of, merge_parts
from mome_dist.checkpoint.saved import Saved
from mome_dist.config import save_config
from mome_dist.errors import UserError
from mome_dist.files import check_absent, published_directory, save_tensors
from mome_dist.versions import version_of

# Sections of a configuration that make weights comparable, number by number.
_MODEL = ("llm", "audio_encoder", "video_encoder", "projector", "mome", "task")


def average(saved: Sequence[Saved]) -> Saved:
    """The mean of the weights of several checkpoints, newest first.

    Returns:
        Weights in fp32, and all else as the newest has it; ``content`` is a hash over those of the sources.

    Raises:
        UserError: they are not of one run: another model, frozen model or tensor.
    """
    newest = saved[0]
    for other in saved[1:]:
        _check_same_model(newest, other)
    weights = {name: _mean([each.weights[name] for each in saved]) for name in newest.weights}
    content = hashlib.sha256("".join(f"{each.content}\n" for each in saved).encode()).hexdigest()
    return dataclasses.replace(newest, weights=weights, content=content if len(saved) > 1 else newest.content)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)


def _check_same_model(first: Saved, other: Saved) -> None:
    def refuse(what: str) -> None:
        raise UserError(
            f"{first.directory} and {other.directory} cannot be averaged: {what} differs. Take checkpoints of one run."
        )

    if first.config.seed != other.config.seed or first.config.name != other.config.name:
        refuse("the run (name or seed)")
    for section in _MODEL:
        if getattr(first.config, section) != getattr(other.config, section):
            refuse(f"section {section!r} of the configuration")
    for section in first.frozen.keys() | other.frozen.keys():
        if first.frozen.get(section) != other.frozen.get(section):
            refuse(f"the frozen model {section!r}")
    for name in sorted(first.weights.keys() | other.weights.keys()):
        one, two = first.weights.get(name), other.weights.get(name)
        if one is None or two is None or one.shape != two.shape or one.dtype != two.dtype:
            refuse(f"tensor {name!r}")


def write_average(target: Path, saved: Sequence[Saved]) -> Saved:
    """Write the mean of checkpoints as a checkpoint of its own, without an optimiser.

    Args:
        target: directory to make; it appears whole or not at all.
        saved: newest first.

    Returns:
        What was written.

    Raises:
        UserError: the target exists, or the checkpoints do not belong together.
    """
    check_absent(target, "an average")
    mean = average(saved)
    tensors = {f"model/{name}": tensor.contiguous() for name, tensor in mean.weights.items()}
    with published_directory(target, replace=False) as directory:
        part = directory / "part-00000.safetensors"
        save_tensors(tensors, part)
        save_config(mean.config, directory / CONFIG)
        # Experts are hashed one by one, as training does it (`mome_dist.checkpoint.save`).
        described = {}
        for name, sharing in mean.sharing.items():
            tensor, by_row = tensors[f"model/{name}"], sharing is not None and sharing.experts is not None
            piece = Part(part.name, 0, len(tensor)) if by_row else Part(part.name, None, None)
            described[f"model/{name}"] = describe_part(tensor, piece, sharing)
        files = {path.name: file_facts(path) for path in (part, directory / CONFIG)}
        complete(directory, index_of(_facts(mean, saved), files, merge_parts([described])))
    return mean


def _facts(mean: Saved, saved: Sequence[Saved]) -> dict[str, Any]:
    return {
        "step": mean.step,
        "averaged": [{"step": each.step, "content": each.content} for each in saved],
        "versions": {name: version_of(name) for name in ("mome_dist", "torch")},
        "frozen": dict(mean.frozen),
    }
