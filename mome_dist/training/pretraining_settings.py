"""Settings and command lines of the two pre-trainings. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from mome_dist.artefact import check_replaceable
from mome_dist.cli import Parser
from mome_dist.data.corpus import Corpus
from mome_dist.errors import UserError


@dataclass(frozen=True)
class VisemeSettings:
    """How to pre-train.

    Attributes:
        steps: optimiser steps; the learning rate warms up and then falls linearly to nothing over them.
        batch_size: clips a step, over all ranks; a multiple of ``group_size``.
        group_size: clips that share a forward pass and its BatchNorm statistics.
        window_frames: consecutive frames taken from a clip at random, once a step.
        learning_rate, weight_decay, warmup_steps, clip_norm: AdamW's.
        calibration_clips: training clips on which the final statistics are measured.
        bf16: run matrix products and convolutions of training in bfloat16.
        seed: decides initial weights, order and augmentation.
    """

    steps: int = 600
    batch_size: int = 16
    group_size: int = 8
    window_frames: int = 24
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    clip_norm: float = 1.0
    calibration_clips: int = 160
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UserError for values that do not fit."""
        for name in ("steps", "batch_size", "group_size", "window_frames", "calibration_clips"):
            if getattr(self, name) < 1:
                raise UserError(f"Viseme pre-training: {name}={getattr(self, name)} must be at least 1.")
        if self.batch_size % self.group_size:
            raise UserError(
                f"Viseme pre-training: batch_size={self.batch_size} must be a multiple of group_size={self.group_size}."
            )


@dataclass(frozen=True)
class CopySettings:
    """How to pre-train: steps, rows a step over all ranks, AdamW's values, and the seed of everything."""

    steps: int = 250
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    warmup_steps: int = 30
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UserError for values that do not fit."""
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"LLM pre-training: {name}={getattr(self, name)} must be at least 1.")


def checked_arguments(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line, and find what the job would fail at: a launcher asks before it starts ranks.

    Args:
        parser: with ``--corpus`` and ``--out``.

    Raises:
        UserError: there is no corpus, or ``--out`` holds something else.
    """
    options = parser.parse_args(arguments)
    Corpus.open(options.corpus)
    check_replaceable(options.out)
    return options
