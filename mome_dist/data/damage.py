"""Utterances whose data cannot be read: found when features are encoded, recorded beside the features, left out by all.
Where training encodes online there is no such record, and every start looks for them.

The record is what makes every rank and every resume leave out the same utterances: once a run has accepted it, nobody
tries them again, so a passing fault of a disk cannot change the training order later. A run that refuses them forgets
the record, so that the next start looks at the mended data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from mome_dist.data.corpus import Corpus
from mome_dist.errors import DamagedDataError, UserError
from mome_dist.files import write_json
from mome_dist.progress import track

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


def find_damage(
    corpus: Corpus,
    split: str,
    streams: Sequence[str],
    rank: int,
    world_size: int,
    barrier: Callable[[], None],
    console: Console,
) -> dict[str, str]:
    """Read all bytes of a split and compare checksums, the ranks sharing the work; every rank calls it.

    Args:
        barrier: waits for all ranks, however long they read.

    Returns:
        The reason by utterance id, sorted by id; the same on all ranks.
    """
    utterances = corpus.split(split)[rank::world_size]
    mine: dict[str, str] = {}
    for utterance in track(utterances, f"checking {split}", console if rank == 0 else None, unit="utterances"):
        for stream in streams:
            try:
                corpus.check(utterance, stream)
            except DamagedDataError as error:
                mine[utterance.id] = str(error)
    barrier()
    found: list[dict[str, str]] = [{}] * world_size
    dist.all_gather_object(found, mine)
    return dict(sorted(item for part in found for item in part.items()))


def forget_damage(directory: Path) -> None:
    """Remove the record, so that the utterances are tried again."""
    for path in directory.glob(PATTERN):
        path.unlink(missing_ok=True)  # another run may have done it


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
