"""What decides which bytes a prepared corpus has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mome_dist.data.media import FPS
from mome_dist.data.preparation.clips import TEST
from mome_dist.data.preparation.mouth import LEAST_FACES, LONGEST_GAP
from mome_dist.errors import UserError
from mome_dist.speech.geometry import AVHUBERT, GEOMETRIES


@dataclass(frozen=True)
class PreparationSettings:
    """Settings of a preparation.

    Attributes:
        source: lrs3, lrs2 or manifests.
        validation_share: of the clips that may be held out, by speaker; 0 for no such split.
        longest_seconds: of an utterance; longer clips are cut where the times of their words are known.
        longest_test_seconds: of a test utterance, which is never cut.
        tolerance_seconds: by how much sound and picture of a clip may differ in length; the shorter one decides.
        longest_gap: frames in a row that may lack a face.
        least_faces: share of an utterance's frames that must show one.
        geometry: how mouths are cropped, and what is taken for granted of crops that are given; see
            `mome_dist.speech.geometry`.
        clips_per_shard: clips of the data set that go into one shard.
        limit: clips of each split to prepare, for a trial; None for all.
    """

    source: str
    validation_share: float = 0.03
    longest_seconds: float = 16.0
    longest_test_seconds: float = 24.0
    tolerance_seconds: float = 0.4
    longest_gap: int = LONGEST_GAP
    least_faces: float = LEAST_FACES
    geometry: str = AVHUBERT
    clips_per_shard: int = 200
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the values. Raises UserError, naming the option."""
        for name, least in (("longest_seconds", 1), ("longest_test_seconds", 1), ("clips_per_shard", 1)):
            self._check(name, getattr(self, name) >= least, f"must be at least {least}")
        for name in ("tolerance_seconds", "longest_gap"):
            self._check(name, getattr(self, name) >= 0, "must not be negative")
        self._check("least_faces", 0 <= self.least_faces <= 1, "must be a share, from 0 to 1")
        self._check("geometry", self.geometry in GEOMETRIES, f"is not known: choose from {', '.join(GEOMETRIES)}")
        self._check("validation_share", 0 <= self.validation_share < 1, "must be at least 0 and less than 1")
        self._check("limit", self.limit is None or self.limit >= 1, "must be at least 1")

    def _check(self, name: str, good: bool, what: str) -> None:
        if not good:
            raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} {what}")

    def longest_frames(self, split: str) -> int:
        """Frames that an utterance of a split may have."""
        return round((self.longest_test_seconds if split == TEST else self.longest_seconds) * FPS)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)
