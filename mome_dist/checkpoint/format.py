"""The checkpoint format: what is in the directory, and reading it.

    step-000100/
      index.json              step, layout that wrote it, identity of the frozen parts, and where every tensor is
      part-00000.safetensors  tensors of one writing rank
      config.yaml             the resolved configuration of the run

Tensors have the names of the one-process model (``model/mome.3.routed.down_weight``); optimiser moments the same names
under ``optimizer/``. A tensor may be spread over parts along its first dimension (experts of different ranks), so a
reader takes the slice it needs, whatever layout wrote it. Nothing in a checkpoint is pickled, and the frozen LLM is
named by hash, never stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mome_dist.errors import UserError
from mome_dist.files import sha256_of

FORMAT = "mome_dist.checkpoint/1"
INDEX = "index.json"
CONFIG = "config.yaml"
LATEST = "latest"


@dataclass(frozen=True)
class Part:
    """A piece of a tensor: rows ``start`` to ``start + rows`` along its first dimension, or all of it if None."""

    file: str
    start: int | None
    rows: int | None


def fingerprint(directory: str | Path) -> str:
    """Identity of a frozen model's directory: a hash over the names and hashes of its config and weight files."""
    files = sorted(
        path for path in Path(directory).iterdir() if path.suffix == ".safetensors" or path.name == "config.json"
    )
    return hashlib.sha256("".join(f"{path.name} {sha256_of(path)}\n" for path in files).encode()).hexdigest()


def newest_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint that ``latest`` names in a run directory; None if there is no checkpoint yet."""
    pointer = Path(run) / "checkpoints" / LATEST
    if not pointer.is_file():
        return None
    path = pointer.parent / pointer.read_text().strip()
    if not (path / INDEX).is_file():
        raise UserError(f"{pointer} names {path.name}, which is not a complete checkpoint; name another or remove it.")
    return path


def newest_whole_checkpoint(run: str | Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run whose every file has the hash that its index names; None if there is none at all.

    Args:
        report: told of each damaged checkpoint that is passed over.

    Raises:
        UserError: if there are checkpoints and all are damaged.
    """
    damaged = []
    for path in sorted((Path(run) / "checkpoints").glob("step-*"), reverse=True):
        try:
            with CheckpointReader(path) as reader:
                reader.verify()
        except UserError as error:
            damaged.append(path.name)
            report(f"{path.name} is damaged and passed over: {error}")
        else:
            return path
    if damaged:
        raise UserError(
            f"{run}/checkpoints: {', '.join(damaged)} are all damaged. Restore one from a copy, or start anew with "
            "training.resume=false."
        )
    return None


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint directory from its own path or from its run's.

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    if (path / INDEX).is_file():
        return path
    found = newest_checkpoint(path)
    if found is None:
        raise UserError(
            f"checkpoint={str(path)!r}: no {INDEX} and no checkpoints/{LATEST} there; name a run or checkpoint."
        )
    return found


class CheckpointReader:
    """Reads slices of tensors from a checkpoint. Use as a context manager.

    Raises:
        UserError: for an unknown format or a missing or damaged file, by name.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._stack, self._open = ExitStack(), {}  # type: ExitStack, dict[str, Any]
        path = self.directory / INDEX
        try:
            self.index: dict[str, Any] = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); the checkpoint is damaged, use an older one.") from error
        if self.index.get("format") != FORMAT:
            raise UserError(f"{path} has format {self.index.get('format')!r}; this version reads {FORMAT!r}.")

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.index["step"])

    def verify(self) -> None:
        """Hash every file and compare with the index."""
        for name, facts in self.index["files"].items():
            path = self.directory / name
            if not path.is_file() or sha256_of(path) != facts["sha256"]:
                raise UserError(f"{path} is missing or damaged; use an older checkpoint.")

    def names(self, prefix: str = "") -> list[str]:
        """Names of all tensors that start with a prefix."""
        return [name for name in self.index["tensors"] if name.startswith(prefix)]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or one row of it along the first dimension; only that is read from disk."""
        facts = self.index["tensors"].get(name)
        if facts is None:
            raise UserError(f"{self.directory} holds no tensor {name!r}; it was written by another configuration.")
        parts = [Part(**part) for part in facts["parts"]]
        if index is None:
            pieces = [self._file(part).get_tensor(name) for part in sorted(parts, key=lambda part: part.start or 0)]
            tensor = pieces[0] if parts[0].start is None else torch.cat(pieces)
            if list(tensor.shape) != facts["shape"]:
                raise UserError(
                    f"{self.directory}: {name!r} has shape {list(tensor.shape)}, not {facts['shape']}; damaged."
                )
            return tensor
        for part in parts:
            first = part.start or 0
            if part.rows is None or first <= index < first + part.rows:
                return self._file(part).get_slice(name)[index - first]
        raise UserError(f"{self.directory}: {name!r} has no row {index}; it was written by another configuration.")

    def _file(self, part: Part) -> Any:
        if part.file not in self._open:
            path = self.directory / part.file
            try:
                self._open[part.file] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}); use an older checkpoint.") from error
        return self._open[part.file]


def merge_parts(described: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Join what the writing ranks say they wrote into the ``tensors`` of an index."""
    tensors: dict[str, Any] = {}
    for description in described:
        for name, (shape, dtype, part) in description.items():
            entry = tensors.setdefault(name, {"shape": [0, *shape[1:]] if part["start"] is not None else shape})
            entry["dtype"] = dtype
            entry.setdefault("parts", []).append(part)
            if part["start"] is not None:
                entry["shape"][0] += part["rows"]
    return dict(sorted(tensors.items()))


def describe_part(tensor: Tensor, part: Part) -> tuple[list[int], str, dict[str, Any]]:
    """What a writing rank says about one piece."""
    return list(tensor.shape), str(tensor.dtype).removeprefix("torch."), asdict(part)
