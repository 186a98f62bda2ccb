"""Directories that are published whole and remember what made them.

A pre-trained encoder or LLM is a directory with a ``pretraining.json``: its settings, the corpus it was trained on (by
the SHA-256 of the manifest) and the results. A job skips its work when the directory already holds the same settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError
from mome_dist.files import published_directory

RECORD_FILE = "pretraining.json"


def manifest_sha256(corpus_directory: str | Path) -> str:
    """SHA-256 of a corpus's ``manifest.json``, which names the hash of every shard: the identity of the corpus."""
    return hashlib.sha256((Path(corpus_directory) / "manifest.json").read_bytes()).hexdigest()


def read_record(directory: str | Path) -> dict[str, Any] | None:
    """Return the ``pretraining.json`` of an artefact, or None where there is no readable one."""
    try:
        record = json.loads((Path(directory) / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def is_current(directory: str | Path, settings: Mapping[str, Any]) -> bool:
    """Whether ``directory`` holds an artefact made with exactly these ``settings`` (JSON values)."""
    record = read_record(directory)
    return record is not None and record.get("settings") == json.loads(json.dumps(settings))


def check_replaceable(directory: str | Path) -> None:
    """Raise UserError where writing an artefact would destroy something else."""
    directory = Path(directory)
    if directory.exists() and read_record(directory) is None and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and was not made by this command: choose another --out or remove it.")


@contextmanager
def publish(directory: str | Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty directory to fill; on a clean exit it takes the place of ``directory``, complete and on disk.

    On an error nothing is left behind and an older artefact stays as it was.
    """
    directory = Path(directory)
    check_replaceable(directory)
    with published_directory(directory, replace=True) as built:
        yield built
        record = {"settings": dict(settings), "results": dict(results)}
        (built / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
