"""Utterances whose data cannot be read: found when features are encoded, recorded beside the features, left out by all.

The record is what makes every rank and every resume leave out the same utterances: once a run has accepted it, nobody
tries them again, so a passing fault of a disk cannot change the training order later. A run that refuses them forgets
the record, so that the next start looks at the mended data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from mome_dist.errors import UserError
from mome_dist.files import write_json

PATTERN = "damaged-*.json"
NAMED = 5  # utterances in an error message


def record_damage(directory: Path, damage: Mapping[str, str]) -> None:
    """Write what one rank found (reason by utterance id) into a feature directory, atomically."""
    if damage:
        name = hashlib.sha256("\n".join(sorted(damage)).encode()).hexdigest()[:16]
        write_json(directory / PATTERN.replace("*", name), dict(sorted(damage.items())))


def recorded_damage(directory: Path) -> dict[str, str]:
    """Reason by utterance id of everything that is recorded in a feature directory, sorted by id.

    Raises:
        UserError: if a record cannot be read.
    """
    found: dict[str, str] = {}
    for path in sorted(directory.glob(PATTERN)):
        try:
            found |= {str(key): str(reason) for key, reason in json.loads(path.read_text(encoding="utf-8")).items()}
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}). Delete it and run the same command again.") from error
    return dict(sorted(found.items()))


def forget_damage(directory: Path) -> None:
    """Remove the record, so that the utterances are tried again."""
    for path in directory.glob(PATTERN):
        path.unlink()


def check_damage(split: str, damage: Mapping[str, str], allowed: int) -> None:
    """Refuse more damaged utterances than a split may have.

    Raises:
        UserError: with the first few utterances, their shards and what is wrong with them.
    """
    if len(damage) <= allowed:
        return
    first = "; ".join(list(damage.values())[:NAMED])
    more = f"; and {len(damage) - NAMED} more" if len(damage) > NAMED else ""
    raise UserError(
        f"{len(damage)} utterances of split {split!r} are damaged: {first}{more}. Make or fetch these shards again, or "
        f"leave the utterances out with data.max_damaged_utterances={len(damage)} (now {allowed})."
    )
