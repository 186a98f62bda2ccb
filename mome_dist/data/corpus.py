"""Reading a corpus: random access to utterances in WebDataset shards by byte offset (`shards` says why not in order).

The manifest names the splits and their shards with sizes and hashes; a split's index gives for every utterance the
shard and the place of each member inside it. Reading is one `os.pread`, which has no file position: descriptors can be
shared by threads and survive a fork. They are still kept per process, so that a forked worker may close its own.

Opening checks everything that is cheap (manifest, indexes, presence and size of shards) and says which file is wrong
and what to do. Reading checks the CRC-32 of each member, or where an older index has none, once the hash of the whole
shard; `Corpus.verify` hashes all shards.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mome_dist.data.media import FPS, SAMPLE_RATE, Audio, Video, decode_flac, decode_video, frames_for_samples
from mome_dist.data.shards import FORMAT, MANIFEST
from mome_dist.errors import DamagedDataError, UserError, no_folder
from mome_dist.files import sha256_of
from mome_dist.speech.geometry import RENDERED
from mome_dist.text_files import lines_of

_AGAIN = "make or fetch the corpus again"


@dataclass(frozen=True)
class Utterance:
    """One line of a split's index.

    ``samples`` counts 16 kHz audio samples, ``frames`` 25 fps video frames (0 where a modality is absent);
    ``members`` maps flac, mp4 and json to (byte offset, size) in ``shard``, ``crc32`` to the checksum of these bytes.
    """

    id: str
    shard: str
    text: str
    speaker: str
    samples: int
    frames: int
    members: Mapping[str, tuple[int, int]] = field(hash=False, repr=False)
    crc32: Mapping[str, int] = field(default_factory=dict, hash=False, repr=False)

    @property
    def length(self) -> int:
        """In video frames, 25 a second, of the longer stream; at least one."""
        return max(self.frames, frames_for_samples(self.samples), 1)


class Corpus:
    """An opened corpus. Make one with `Corpus.open`; it can be pickled to workers and used across forks."""

    def __init__(self, directory: Path, manifest: dict[str, Any], splits: dict[str, list[Utterance]]) -> None:
        self.directory = directory
        self.manifest = manifest
        self._splits = splits
        self._descriptors: dict[tuple[int, str], int] = {}
        self._sound: dict[str, bool] = {}  # shards without checksums of members, after they were hashed

    @classmethod
    def open(cls, directory: str | Path) -> Corpus:
        """Open a corpus directory. Raises UserError, naming file and fix, for anything missing or inconsistent."""
        directory = Path(directory)
        manifest = _read_manifest(directory)
        splits = {name: _read_split(directory, name, entry) for name, entry in manifest["splits"].items()}
        return cls(directory, manifest, splits)

    @property
    def viseme_names(self) -> list[str] | None:
        """Class names of the per-frame ``visemes`` in the metadata, or None where the corpus has none."""
        names: list[str] | None = self.manifest.get("viseme_names")
        return names

    @property
    def geometry(self) -> str | None:
        """The geometry of its crops (`mome_dist.speech.geometry`), or None where nothing tells it.

        Manifests of older versions do not name it: the synthetic corpora among them are as they are today, and of
        films these versions made crops that no encoder was trained on.
        """
        before = RENDERED if "generator_version" in self.manifest.get("settings", {}) else None
        geometry: str | None = self.manifest.get("geometry", before)
        return geometry

    @property
    def split_names(self) -> list[str]:
        """Names of the splits, in the manifest's order."""
        return list(self._splits)

    def split(self, name: str) -> list[Utterance]:
        """Utterances of a split in stored order. Raises UserError when there is no such split."""
        if name not in self._splits:
            raise UserError(f"{self.directory}: no split {name!r}; choose one of {', '.join(self._splits)}")
        return list(self._splits[name])

    def audio(self, utterance: Utterance) -> Audio:
        """Speech as float32 [samples] in [-1, 1] at 16 kHz. Raises DamagedDataError where it cannot be read whole."""
        return decode_flac(self._member(utterance, "flac"), self._source(utterance, "flac"), utterance.samples)

    def video(self, utterance: Utterance) -> Video:
        """Mouth crop as grey uint8 [frames, height, width] at 25 fps. Raises DamagedDataError like `audio`."""
        return decode_video(self._member(utterance, "mp4"), self._source(utterance, "mp4"), utterance.frames)

    def check(self, utterance: Utterance, stream: str) -> None:
        """Read the bytes of a stream ("audio" or "video") without decoding. Raises DamagedDataError like `audio`."""
        self._member(utterance, {"audio": "flac", "video": "mp4"}[stream])

    def metadata(self, utterance: Utterance) -> dict[str, Any]:
        """Metadata, with ``visemes`` (one class number a video frame) where known."""
        source = self._source(utterance, "json")
        try:
            metadata = json.loads(self._member(utterance, "json"))
        except ValueError as error:
            raise UserError(f"{source}: not JSON ({error}); {_AGAIN}") from error
        if not isinstance(metadata, dict):
            raise UserError(f"{source}: must hold a JSON object; {_AGAIN}")
        return metadata

    def verify(self) -> None:
        """Hash every shard against the manifest. Raises UserError for the first that differs."""
        for split in self.manifest["splits"].values():
            for shard in split["shards"]:
                path = self.directory / shard["file"]
                actual = sha256_of(path)
                if actual != shard["sha256"]:
                    raise UserError(f"{path}: SHA-256 is {actual}, the manifest says {shard['sha256']}; {_AGAIN}")

    def close(self) -> None:
        """Close this process's descriptors; reading opens them again."""
        pid = os.getpid()
        for key in [key for key in self._descriptors if key[0] == pid]:
            os.close(self._descriptors.pop(key))

    def _source(self, utterance: Utterance, kind: str) -> str:
        return f"{self.directory / utterance.shard}: {utterance.id}.{kind}"

    def _member(self, utterance: Utterance, kind: str) -> bytes:
        if kind not in utterance.members:
            raise UserError(
                f"{self._source(utterance, kind)}: the corpus holds no such member; choose another modality"
            )
        offset, size = utterance.members[kind]
        key = (os.getpid(), utterance.shard)
        if key not in self._descriptors:
            try:
                self._descriptors[key] = os.open(self.directory / utterance.shard, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(
                    f"{self._source(utterance, kind)}: cannot open the shard ({error}); {_AGAIN}"
                ) from error
        try:
            data = os.pread(self._descriptors[key], size, offset)
        except OSError as error:
            raise DamagedDataError(f"{self._source(utterance, kind)}: cannot be read ({error}); {_AGAIN}") from error
        if len(data) != size:
            raise DamagedDataError(f"{self._source(utterance, kind)}: the shard ends before it; {_AGAIN}")
        if kind in utterance.crc32:
            if zlib.crc32(data) != utterance.crc32[kind]:
                raise DamagedDataError(f"{self._source(utterance, kind)}: its bytes have changed (CRC-32); {_AGAIN}")
        elif not self._is_sound(utterance.shard):
            raise DamagedDataError(f"{self._source(utterance, kind)}: the shard has another SHA-256; {_AGAIN}")
        return data

    def _is_sound(self, shard: str) -> bool:
        """Whether a shard has the hash that the manifest names; computed once."""
        if shard not in self._sound:
            expected = [
                s["sha256"] for split in self.manifest["splits"].values() for s in split["shards"] if s["file"] == shard
            ]
            self._sound[shard] = expected == [sha256_of(self.directory / shard)]
        return self._sound[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        wrong = f"{path}: no manifest" if directory.is_dir() else f"{directory} {no_folder(directory)}"
        raise UserError(
            f"{wrong}; name a corpus (train: data.corpus=DIR, evaluate: corpus=DIR, pretrain: --corpus DIR), or make "
            "one with mome-dist prepare synthetic (synthetic) or mome-dist prepare (of a data set)"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {_AGAIN}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format is {found!r}, this version reads {FORMAT!r}; {_AGAIN}")
    for key, expected in (("sample_rate", SAMPLE_RATE), ("fps", FPS)):
        if manifest.get(key) != expected:
            raise UserError(f"{path}: {key} is {manifest.get(key)!r}, must be {expected}; prepare the corpus again")
    if not isinstance(manifest.get("splits"), dict) or not manifest["splits"]:
        raise UserError(f"{path}: 'splits' names no split; {_AGAIN}")
    for name, entry in manifest["splits"].items():
        _check_split_entry(path, name, entry)
    return manifest


def _check_split_entry(path: Path, name: str, entry: Any) -> None:
    where = f"{path}: split {name!r}"
    if not isinstance(entry, dict) or not isinstance(entry.get("index"), str):
        raise UserError(f"{where} names no index file; {_AGAIN}")
    if not isinstance(entry.get("shards"), list) or not entry["shards"]:
        raise UserError(f"{where} has no shards; {_AGAIN}")
    types = {"file": str, "bytes": int, "sha256": str, "utterances": int}
    for shard in entry["shards"]:
        if not isinstance(shard, dict) or any(not isinstance(shard.get(key), kind) for key, kind in types.items()):
            raise UserError(f"{where}: shard entry {shard!r} needs {', '.join(types)}; {_AGAIN}")
    for file in [entry["index"], *(shard["file"] for shard in entry["shards"])]:
        if Path(file).name != file:
            raise UserError(f"{where}: file {file!r} must be a plain name inside the corpus directory")


def _read_split(directory: Path, name: str, entry: dict[str, Any]) -> list[Utterance]:
    sizes = {shard["file"]: _check_shard(directory, shard) for shard in entry["shards"]}
    path = directory / entry["index"]
    if not path.is_file():
        raise UserError(f"{path}: the index of split {name!r} is missing; {_AGAIN}")
    utterances = [
        _parse_line(f"{path}:{number}", line, directory, sizes) for number, line in enumerate(lines_of(path), 1)
    ]
    if not utterances:
        raise UserError(f"{path}: split {name!r} is empty; {_AGAIN}")
    if len(utterances) != entry.get("utterances"):
        raise UserError(f"{path}: {len(utterances)} utterances, the manifest says {entry.get('utterances')}; {_AGAIN}")
    if len({utterance.id for utterance in utterances}) != len(utterances):
        raise UserError(f"{path}: an utterance id occurs twice; {_AGAIN}")
    return utterances


def _check_shard(directory: Path, shard: dict[str, Any]) -> int:
    path = directory / shard["file"]
    if not path.is_file():
        raise UserError(f"{path}: the shard is missing; {_AGAIN}")
    size = path.stat().st_size
    if size == 0 or shard["utterances"] == 0:
        raise UserError(f"{path}: the shard is empty; {_AGAIN}")
    if size != shard["bytes"]:
        raise UserError(f"{path}: {size} bytes, the manifest says {shard['bytes']}; {_AGAIN}")
    return size


def _parse_line(where: str, line: str, directory: Path, sizes: dict[str, int]) -> Utterance:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); {_AGAIN}") from error
    try:
        shard = fields["shard"]
        utterance = Utterance(
            id=str(fields["id"]),
            shard=shard,
            text=str(fields["text"]),
            speaker=str(fields["speaker"]),
            samples=int(fields["samples"]),
            frames=int(fields["frames"]),
            members={kind: (int(place[0]), int(place[1])) for kind, place in fields["members"].items()},
            crc32={kind: int(value) for kind, value in fields.get("crc32", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: bad or missing field ({type(error).__name__}: {error}); {_AGAIN}") from error
    if shard not in sizes:
        known = "is missing from the manifest" if (directory / str(shard)).is_file() else "does not exist"
        raise UserError(f"{where}: utterance {utterance.id!r} is in shard {shard!r}, which {known}; {_AGAIN}")
    if any(offset < 0 or size < 0 or offset + size > sizes[shard] for offset, size in utterance.members.values()):
        raise UserError(f"{where}: a member of {utterance.id!r} lies outside {shard}; {_AGAIN}")
    return utterance
