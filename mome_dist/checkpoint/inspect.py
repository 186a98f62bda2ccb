"""What is in a checkpoint, and whether all of it is as it was written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mome_dist.checkpoint.format import CheckpointReader
from mome_dist.checkpoint.hashes import content_hash, tensor_hash
from mome_dist.errors import UserError


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a checkpoint as its index describes it.

    Attributes:
        parts: files that it is spread over.
        bytes: of its elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: int
    bytes: int


@dataclass(frozen=True)
class Kind:
    """All tensors of one kind: the model's, one optimiser moment's, the random generators'."""

    name: str
    tensors: int
    elements: int
    bytes: int


def tensors_of(index: dict[str, Any]) -> Iterator[TensorFacts]:
    """The tensors of an index, by name."""
    for name, facts in index["tensors"].items():
        shape = tuple(facts["shape"])
        size = math.prod(shape) * getattr(torch, facts["dtype"]).itemsize
        yield TensorFacts(name, facts["dtype"], shape, len(facts["parts"]), size)


def kinds_of(index: dict[str, Any]) -> list[Kind]:
    """The tensors of an index, added up by kind."""
    by_kind: dict[str, list[TensorFacts]] = {}
    for tensor in tensors_of(index):
        by_kind.setdefault(_kind(tensor.name), []).append(tensor)
    return [
        Kind(name, len(group), sum(math.prod(tensor.shape) for tensor in group), sum(tensor.bytes for tensor in group))
        for name, group in by_kind.items()
    ]


def _kind(name: str) -> str:
    first, second, *_ = name.split("/")
    return f"{first}/{second}" if first == "optimizer" else first


def check(directory: Path) -> Iterator[str]:
    """Check everything that can be checked, yielding a line for each thing that was found right.

    Raises:
        UserError: naming the first file or tensor that is not as it was written.
    """
    with CheckpointReader(directory) as reader:
        yield "index.json has the hash in index.sha256"
        reader.verify()
        yield f"{len(reader.index['files'])} files have their hashes, and no other file is there"
        _check_tensors(reader, reader.names())
        yield f"{len(reader.names())} tensors have their hashes, shapes and finite values"
        if content_hash(reader.index["tensors"]) != reader.content:
            raise UserError(f"{directory}: the content hash is not that of the tensors; use an older checkpoint.")
        yield "the content hash is that of the tensors"


def _check_tensors(reader: CheckpointReader, names: Iterable[str]) -> None:
    for name in names:
        facts = reader.index["tensors"][name]
        tensor = reader.read(name)
        if tensor_hash(tensor, by_row=facts["parts"][0]["start"] is not None) != facts["sha256"]:
            raise UserError(f"{reader.directory}: {name!r} does not have its hash; use an older checkpoint.")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{reader.directory}: {name!r} holds values that are not finite; use an older checkpoint.")
