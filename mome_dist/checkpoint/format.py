"""The checkpoint format: what is in the directory, and reading it.

    step-000100/
      index.json              step, data position, identity of the frozen parts, where every tensor is, all hashes
      index.sha256            the hash of index.json itself, as sha256sum prints it
      part-00000.safetensors  tensors of one writing rank
      config.yaml             the resolved configuration of the run

Tensors have the names of the one-process model (``model/mome.3.routed.down_weight``); optimiser moments the same names
under ``optimizer/exp_avg/`` and so on; ``rng/RANK/`` holds the random-number generators of the writing ranks. A tensor
may be spread over parts along its first dimension (experts of different ranks), so a reader takes the slice it needs,
whatever layout wrote it. Beside each tensor of the model and the optimiser, ``sharing`` says how ranks share it
(`mome_dist.sharing`); checkpoints of before there was such a description are read by its `of_format_2`. Nothing in a
checkpoint is pickled, and the frozen LLM is named by hash, never stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mome_dist.checkpoint.hashes import content_hash, digest, joined, row_digests
from mome_dist.errors import UserError
from mome_dist.files import fsync, sha256_of
from mome_dist.hub import model_at, weight_files
from mome_dist.sharing import Sharing, from_json, of_format_2
from mome_dist.trained import EXPORT, find_trained, nothing_at

FORMAT = "mome_dist.checkpoint/2"
INDEX = "index.json"
SEAL = "index.sha256"
CONFIG = "config.yaml"
LATEST = "latest"


@dataclass(frozen=True)
class Part:
    """A piece of a tensor: rows ``start`` to ``start + rows`` along its first dimension, or all of it if None."""

    file: str
    start: int | None
    rows: int | None


def fingerprint(directory: str | Path) -> str:
    """Identity of a frozen model's directory: a hash over the names and hashes of its config and weight files.

    In the cache of the hub others may put further files into the same directory: only those that are read count there.
    """
    directory = Path(directory)
    if model_at(directory) is not None:
        files = sorted(directory / name for name in ("config.json", *weight_files(directory)))
    else:
        files = sorted(
            path for path in directory.iterdir() if path.suffix == ".safetensors" or path.name == "config.json"
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


def checkpoints_of(run: str | Path) -> list[Path]:
    """Every published checkpoint of a run, newest first, whole or not."""
    return sorted((Path(run) / "checkpoints").glob("step-*"), reverse=True)


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint directory from its own path or from its run's.

    Raises:
        UserError: if there is none.
    """
    found = find_trained(path)
    if found.kind == EXPORT:
        raise nothing_at(path)
    return found.config.parent


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
            content = path.read_bytes()
            sealed = (self.directory / SEAL).read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}); the checkpoint is damaged, use an older one.") from error
        if sealed != seal_of(content):
            raise UserError(f"{path} does not have the hash in {SEAL}; the checkpoint is damaged, use an older one.")
        self.index: dict[str, Any] = json.loads(content)
        if self.index.get("format") != FORMAT:
            raise UserError(f"{path} has format {self.index.get('format')!r}; this version reads {FORMAT!r}.")

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def step(self) -> int:
        """Steps of the schedule done, skipped ones included: where to go on."""
        return int(self.index["step"])

    @property
    def content(self) -> str:
        """The hash of the model and the optimiser, whatever layout wrote them."""
        return str(self.index["content"])

    def verify(self, files: Collection[str] | None = None) -> None:
        """Hash the files, or some of them, and compare with the index.

        Raises:
            UserError: naming the first one that is missing, damaged, or not of the checkpoint.
        """
        expected = self.index["files"]
        strays = {path.name for path in self.directory.iterdir()} - {*expected, INDEX, SEAL}
        if strays:
            raise UserError(f"{self.directory} holds {min(strays)}, which is not of the checkpoint; remove it.")
        for name in expected if files is None else files:
            path = self.directory / name
            if not path.is_file() or sha256_of(path) != expected[name]["sha256"]:
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


def sharing_of(name: str, entry: dict[str, Any]) -> Sharing | None:
    """How ranks share a tensor of an index; None for what belongs to one rank.

    Args:
        name: with its prefix.
        entry: that the index has of it.
    """
    kind, _, rest = name.partition("/")
    if kind not in ("model", "optimizer"):
        return None
    if "sharing" in entry:
        return from_json(entry["sharing"])
    stacked = any(part["start"] is not None for part in entry["parts"])
    return of_format_2(rest if kind == "model" else rest.partition("/")[2], entry["shape"], stacked)


def describe_part(tensor: Tensor, part: Part, sharing: Sharing | None) -> dict[str, Any]:
    """What a writing rank says about one piece of a tensor."""
    return {
        **described_sharing(sharing),
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "digests": [digest(tensor)] if part.start is None else row_digests(tensor),
        "part": {"file": part.file, "start": part.start, "rows": part.rows},
    }


def described_sharing(sharing: Sharing | None) -> dict[str, Any]:
    """The description of a tensor as an index has it."""
    return {} if sharing is None else {"sharing": sharing.as_json()}


def merge_parts(described: Iterable[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Join what the writing ranks say they wrote, by tensor name, into the ``tensors`` of an index."""
    pieces: dict[str, list[dict[str, Any]]] = {}
    for description in described:
        for name, piece in description.items():
            pieces.setdefault(name, []).append(piece)
    return {name: _merged(name, pieces[name]) for name in sorted(pieces)}


def _merged(name: str, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = pieces[0]
    parts = [piece["part"] for piece in pieces]
    described = {"sharing": first["sharing"]} if "sharing" in first else {}
    if first["part"]["start"] is None:
        assert len(pieces) == 1, f"{name} was written by {len(pieces)} ranks"
        return {
            "shape": first["shape"],
            "dtype": first["dtype"],
            "sha256": first["digests"][0],
            **described,
            "parts": parts,
        }
    pieces = sorted(pieces, key=lambda piece: piece["part"]["start"])
    rows = 0
    for piece in pieces:
        assert piece["part"]["start"] == rows, f"rows of {name} are missing or written twice"
        rows += piece["part"]["rows"]
    return {
        "shape": [rows, *first["shape"][1:]],
        "dtype": first["dtype"],
        "sha256": joined(row for piece in pieces for row in piece["digests"]),
        **described,
        "parts": [piece["part"] for piece in pieces],
    }


def index_of(facts: dict[str, Any], files: dict[str, Any], tensors: dict[str, Any]) -> bytes:
    """The content of ``index.json``.

    Args:
        facts: all else that it holds (step, data position, versions, ...).
        files: size and SHA-256 of each file by name.
        tensors: from `merge_parts`.
    """
    index = {"format": FORMAT, **facts, "content": content_hash(tensors), "files": files, "tensors": tensors}
    return (json.dumps(index, indent=1) + "\n").encode()


def seal_of(index: bytes) -> bytes:
    """The content of ``index.sha256`` for an index."""
    return f"{hashlib.sha256(index).hexdigest()}  {INDEX}\n".encode()


def file_facts(path: Path) -> dict[str, Any]:
    """What an index says about a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def complete(directory: Path, index: bytes) -> None:
    """Add the index to a directory of parts with its ``config.yaml``, and see that all of it is on disk."""
    (directory / INDEX).write_bytes(index)
    (directory / SEAL).write_bytes(seal_of(index))
    for path in (directory / INDEX, directory / SEAL, directory / CONFIG, directory):
        fsync(path)
