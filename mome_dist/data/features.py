"""Features of frozen encoders, computed once and read from disk ever after.

A frozen encoder gives the same features in every epoch, so each utterance is encoded once. A store is a directory of
safetensors files ("parts") with one float16 tensor [frames, width] per utterance id. The ranks of a job share the work,
each writing parts of its own; any number of ranks may read them, since a reader looks an id up over all parts and maps
the file into memory.

Stores are never patched: a part is written aside and renamed into place, whole. So several runs may fill one store at
once: each encodes what was not there when it began, and equal parts have equal names. A part that cannot be read is
removed with a warning and its utterances are encoded again, and so are utterances that no part holds (an interrupted
job resumes). Every tensor carries a checksum that is verified when it is first read. Utterances that cannot be read are
recorded beside the parts (see `damage`), and not tried again while the record is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mome_dist.data.corpus import Utterance
from mome_dist.data.damage import record_damage, recorded_damage
from mome_dist.errors import DamagedDataError, UserError
from mome_dist.files import fsync, save_tensors, written_aside
from mome_dist.progress import track

FORMAT = "mome_dist.features/1"
SUFFIX = ".safetensors"
PART_BYTES = 256 << 20
_FLOAT16_MAX = 65504.0

logger = logging.getLogger(__name__)

Encode = Callable[[list[Utterance]], list[Tensor]]
"""Maps utterances to their features, floating tensors [frames, width]."""


def encoder_fingerprint(encoder: nn.Module, settings: dict[str, Any] | None = None) -> str:
    """Return 16 hexadecimal digits that change with any weight, buffer or ``settings`` value (JSON) of an encoder."""
    digest = hashlib.sha256(json.dumps(settings or {}, sort_keys=True).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def feature_directory(root: str | Path, corpus_sha256: str, encoder_name: str, split: str) -> Path:
    """Where the features of a split belong; ``encoder_name`` should end in the encoder's fingerprint."""
    return Path(root) / corpus_sha256[:16] / encoder_name / split


class FeatureStore:
    """Read access to the features of one split. Made by `build_features`, or `FeatureStore(directory)` later.

    Attributes:
        damaged: utterances that could not be encoded, with the reason.
        encoded: ids that `build_features` encoded when it made this store, over all ranks.

    Raises:
        UserError: there is no readable part, or parts come from different encoders.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._parts: dict[str, Path] = {}
        self._checksums: dict[str, int] = {}
        self._open: dict[tuple[int, Path], Any] = {}
        self._verified: set[str] = set()
        self.encoder_name = ""
        self.damaged = recorded_damage(self.directory)
        self.encoded: list[str] = []
        for path, error in _parts(self.directory):
            if error is not None:
                raise UserError(f"{path} is damaged ({error}). Delete it and run the same command again.")
            name, checksums = _describe(path)
            if self.encoder_name not in ("", name):
                raise UserError(f"{path} holds features of {name!r}, others are of {self.encoder_name!r}. Delete one.")
            self.encoder_name = name
            self._checksums |= checksums
            self._parts |= dict.fromkeys(checksums, path)
        if not self._parts and not self.damaged:
            raise UserError(f"{self.directory} holds no features. Run the command that encodes the corpus.")

    def __len__(self) -> int:
        return len(self._parts)

    def size(self) -> int:
        """Bytes of all parts."""
        return sum(path.stat().st_size for path in set(self._parts.values()))

    def __contains__(self, utterance_id: str) -> bool:
        return utterance_id in self._parts

    def get(self, utterance_id: str) -> Tensor:
        """Return the features of an utterance, float16 [frames, width].

        Raises:
            UserError: the store does not hold the utterance, or its bytes changed on disk.
        """
        path = self._parts.get(utterance_id)
        if path is None:
            raise UserError(
                f"{self.directory} holds no features of utterance {utterance_id!r}. Encode the corpus again."
            )
        key = (os.getpid(), path)
        if key not in self._open:
            self._open[key] = safe_open(path, framework="pt")
        features: Tensor = self._open[key].get_tensor(utterance_id)
        if utterance_id not in self._verified:
            if _checksum(features.numpy()) != self._checksums[utterance_id]:
                raise UserError(f"{path}: features of {utterance_id!r} are damaged. Delete the file and encode again.")
            self._verified.add(utterance_id)
        return features

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def build_features(
    encoder_name: str,
    encode: Encode,
    utterances: Sequence[Utterance],
    directory: str | Path,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    share: Callable[[list[str]], list[str]] = lambda ids: ids,
    batch_size: int = 16,
    console: Console | None = None,
) -> FeatureStore:
    """Encode what the store in ``directory`` lacks, sharing the work between ranks, and open it.

    Every rank of the world must call this with the same arguments but ``rank``; ``directory`` is on a file system that
    all of them see.

    Args:
        encoder_name: identity of the encoder; should contain its `encoder_fingerprint`.
        encode: called with up to ``batch_size`` utterances of similar length. Where it raises `DamagedDataError`, it is
            called again with one at a time.
        barrier: waits for all ranks, however long they encode.
        share: gives every rank what rank 0 gave.
        console: where rank 0 shows progress; none by default.

    Raises:
        UserError: features do not fit float16, or the directory holds features of another encoder.
    """
    directory = Path(directory)
    damaged = [(path, error) for path, error in _parts(directory) if error is not None]
    present: set[str] = set()
    for path, error in _parts(directory):
        if error is None:
            name, checksums = _describe(path)
            if name != encoder_name:
                raise UserError(
                    f"{path} holds features of {name!r}, not of {encoder_name!r}: choose another directory."
                )
            present |= set(checksums)
    present |= set(recorded_damage(directory))
    # Another run may be filling the same store, and ranks would see more or less of it: what rank 0 saw counts.
    lacking = set(share([utterance.id for utterance in utterances if utterance.id not in present]))
    missing = sorted((u for u in utterances if u.id in lacking), key=lambda u: (u.samples, u.frames, u.id))
    barrier()  # every rank has seen the same damaged files
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for path, error in damaged:
            logger.warning("%s is damaged (%s): removed, its utterances are encoded again.", path, error)
            path.unlink(missing_ok=True)  # another run may have done it
    barrier()  # nothing is written before the damaged parts are gone
    # Whole batches are dealt out: what is encoded together, and so every bit, is the same with any number of ranks.
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)][rank::world_size]
    shown = track(batches, f"encoding {directory.name}", console if rank == 0 and batches else None, unit="batches")
    record_damage(directory, _write_parts(encoder_name, encode, shown, directory))
    barrier()
    store = FeatureStore(directory)
    store.encoded = [utterance.id for utterance in missing if utterance.id in store]
    return store


def _write_parts(
    encoder_name: str, encode: Encode, batches: Iterable[list[Utterance]], directory: Path
) -> dict[str, str]:
    """Encode and write; return the reason by id for utterances that cannot be read."""
    pending: dict[str, NDArray[np.float16]] = {}
    damaged: dict[str, str] = {}
    for batch in batches:
        sound = list(_encode_sound(encode, batch, damaged))
        ids = [utterance.id for utterance, _ in sound]
        rounded = to_float16([features for _, features in sound], ids, encoder_name)
        pending |= {name: _array(features) for name, features in zip(ids, rounded, strict=True)}
        if sum(array.nbytes for array in pending.values()) >= PART_BYTES:
            _write_part(encoder_name, pending, directory)
            pending = {}
    if pending:
        _write_part(encoder_name, pending, directory)
    return damaged


def _encode_sound(
    encode: Encode, batch: list[Utterance], damaged: dict[str, str]
) -> Iterable[tuple[Utterance, Tensor]]:
    """Encode a batch without those of its utterances that cannot be read; add these to ``damaged``."""
    try:
        return zip(batch, encode(batch), strict=True)
    except DamagedDataError as error:
        if len(batch) == 1:
            damaged[batch[0].id] = str(error)
            return []
        return [pair for utterance in batch for pair in _encode_sound(encode, [utterance], damaged)]


def to_float16(features: Sequence[Tensor], utterance_ids: Sequence[str], encoder_name: str) -> list[Tensor]:
    """Round features that were encoded together as a store does: float16 [frames, width] each, on their device.

    The host looks at the device once for all of them, and at each only to name one that is wrong.

    Raises:
        UserError: some have another form, are not finite, or too large; it names the first.
    """
    if not features:
        return []
    width = features[0].shape[-1]
    if all(each.ndim == 2 and each.shape[1] == width for each in features):
        together = torch.cat([each.detach() for each in features])
        if _largest(together) <= _FLOAT16_MAX:  # false for NaN, too
            return list(together.to(torch.float16).split([len(each) for each in features]))
    for name, each in zip(utterance_ids, features, strict=True):
        largest = _largest(each.detach())
        if each.ndim != 2 or each.shape[1] != width or not largest <= _FLOAT16_MAX:
            raise UserError(
                f"Encoder {encoder_name!r} gives {name!r} features of shape {list(each.shape)} and size {largest}; "
                f"they must be [frames, width], finite and at most {_FLOAT16_MAX:.0f}. Check its weights."
            )
    raise AssertionError("one of them is wrong")


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _array(features: Tensor) -> NDArray[np.float16]:
    return np.ascontiguousarray(features.cpu().numpy())


def _write_part(encoder_name: str, arrays: dict[str, NDArray[np.float16]], directory: Path) -> None:
    """Publish one part atomically; its name follows from the ids in it."""
    checksums = {name: _checksum(array) for name, array in arrays.items()}
    metadata = {"format": FORMAT, "encoder": encoder_name, "crc32": json.dumps(checksums)}
    name = hashlib.sha256("\n".join(sorted(arrays)).encode()).hexdigest()[:16]
    with written_aside(directory / f"part-{name}{SUFFIX}") as path:
        save_tensors({name: torch.from_numpy(array) for name, array in arrays.items()}, path, metadata)
    fsync(directory)


def _parts(directory: Path) -> list[tuple[Path, str | None]]:
    """Every part of a store with the reason why it cannot be read, None for a sound one."""
    found: list[tuple[Path, str | None]] = []
    for path in sorted(directory.glob(f"part-*{SUFFIX}")):
        try:
            _describe(path)
            found.append((path, None))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            found.append((path, str(error)))
    return found


def _describe(path: Path) -> tuple[str, dict[str, int]]:
    """Encoder name and checksum of each utterance of a part; opening checks the header against the file's size."""
    with safe_open(path, framework="np") as part:
        metadata = part.metadata() or {}
        names = set(part.keys())
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format is {metadata.get('format')!r}, not {FORMAT!r}")
    checksums: dict[str, int] = json.loads(metadata["crc32"])
    if set(checksums) != names:
        raise ValueError("its checksums name other utterances than it holds")
    return metadata["encoder"], checksums


def _checksum(array: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
