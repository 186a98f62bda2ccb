"""Hashes of tensors that do not depend on how a checkpoint is cut into files.

A tensor that may be spread over parts along its first dimension (experts) is hashed row by row, so that any rank can
hash what it has and the whole follows from the digests of the rows. The content hash of a checkpoint covers what the
model and the optimiser are: two checkpoints with the same one continue alike, whatever layout wrote them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

CONTENT = ("model/", "optimizer/")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor on the CPU as bytes, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's elements, in hexadecimal."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def row_digests(tensor: Tensor) -> list[str]:
    """The `digest` of each row along the first dimension."""
    content = raw_bytes(tensor)
    size = len(content) // len(tensor)
    return [hashlib.sha256(content[start : start + size]).hexdigest() for start in range(0, len(content), size)]


def joined(digests: Iterable[str]) -> str:
    """The hash of a tensor from the digests of all its rows, in order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def tensor_hash(tensor: Tensor, by_row: bool) -> str:
    """The hash of a whole tensor as an index has it."""
    return joined(row_digests(tensor)) if by_row else digest(tensor)


class StreamedHash:
    """`tensor_hash` of a tensor whose bytes come in pieces, in order.

    Args:
        row: bytes of a row along the first dimension; None hashes the tensor as one.
    """

    def __init__(self, row: int | None) -> None:
        self._row, self._left, self._hash = row, row, hashlib.sha256()
        self.digests: list[str] = []

    def update(self, data: memoryview) -> None:
        """Add bytes."""
        while self._row is not None and self._left is not None and len(data) >= self._left:
            self._hash.update(data[: self._left])
            self.digests.append(self._hash.hexdigest())
            data, self._left, self._hash = data[self._left :], self._row, hashlib.sha256()
        self._hash.update(data)
        if self._left is not None:
            self._left -= len(data)

    def finish(self) -> list[str]:
        """The digest of every row, or of the whole tensor."""
        return self.digests if self._row is not None else [self._hash.hexdigest()]


def content_hash(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """The hash over the model's and the optimiser's tensors in the ``tensors`` of an index."""
    lines = [
        f"{name} {facts['dtype']} {facts['shape']} {facts['sha256']}\n"
        for name, facts in sorted(tensors.items())
        if name.startswith(CONTENT)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def content_of_weights(weights: Mapping[str, Tensor]) -> str:
    """One hash for weights in memory, of any devices, whatever their order."""
    facts = (f"{name} {list(value.shape)} {digest(value.float().cpu())}\n" for name, value in sorted(weights.items()))
    return hashlib.sha256("".join(facts).encode()).hexdigest()
