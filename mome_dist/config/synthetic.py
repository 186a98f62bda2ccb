"""What a synthetic corpus is made from, and the directory name that follows from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mome_dist.config.speech_backends import resolve_backend
from mome_dist.errors import UserError
from mome_dist.paths import cache_root

# Raise it with every change that alters what is generated: corpora of older versions are then made anew.
GENERATOR_VERSION = 2

# The test set is drawn first, so that another number of training utterances leaves it as it is.
SPLITS = ("test", "validation", "train")


@dataclass(frozen=True)
class SyntheticSettings:
    """Numbers of utterances and of speakers (voice and face settings) a split, seed, and speech backend.

    ``backend``: ``flite``, ``espeak``, or ``auto`` for the first one of them that is installed.
    """

    train: int = 1600
    validation: int = 80
    test: int = 72
    train_speakers: int = 48
    validation_speakers: int = 8
    test_speakers: int = 12
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        for split in SPLITS:
            if self.utterances(split) < 1 or self.speakers(split) < 1:
                raise UserError(
                    f"{split}: {self.utterances(split)} utterances of {self.speakers(split)} speakers; use >= 1"
                )

    def utterances(self, split: str) -> int:
        """Number of utterances in a split."""
        return int(getattr(self, split))

    def speakers(self, split: str) -> int:
        """Number of speakers in a split."""
        return int(getattr(self, f"{split}_speakers"))

    def resolved(self) -> SyntheticSettings:
        """The same settings with the backend that ``auto`` stands for. Raises UserError when none is installed."""
        return replace(self, backend=resolve_backend(self.backend))

    def as_dict(self) -> dict[str, Any]:
        """JSON form with the generator's version, as the manifest keeps it."""
        return {"generator_version": GENERATOR_VERSION, **asdict(self)}


def default_corpus_dir(settings: SyntheticSettings) -> Path:
    """``<cache>/corpora/synthetic-<hash8>``: one directory for one set of settings."""
    text = json.dumps(settings.resolved().as_dict(), sort_keys=True)
    return cache_root() / "corpora" / f"synthetic-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
