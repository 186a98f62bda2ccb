"""Writing a corpus: WebDataset tar shards with byte offsets, JSON-lines indexes and a manifest.

A shard is a plain USTAR archive, written with ``webdataset.TarWriter``; ``webdataset.WebDataset(shards)`` reads it from
front to back without the index, which is the way for pipelines outside of this project. Everything here reads in
another order (batches of like lengths, epochs in random order) or goes on behind damaged bytes, where an archive that
is read in order ends. For that, the byte offset and CRC-32 of every member are noted in an index while writing:
`corpus.Corpus` reads any utterance with one seek.
Bytes depend on the content alone (no times, no owners), so the same utterances give the same SHA-256 anywhere.

The corpus is built in a temporary directory beside its final place and renamed when every file is on disk, the
manifest last: a directory under the final name is always complete.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
import zlib
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mome_dist.data.media import FPS, SAMPLE_RATE
from mome_dist.errors import UserError
from mome_dist.files import aside, fsync, sha256_of, sweep, write_text

FORMAT = "mome_dist.corpus/1"
MANIFEST = "manifest.json"
INDEXED_MEMBERS = ("flac", "mp4", "json")


@dataclass(frozen=True)
class EncodedUtterance:
    """One utterance ready to be stored. ``flac`` or ``mp4`` may be None (a corpus of one modality)."""

    id: str
    text: str
    speaker: str
    samples: int
    frames: int
    flac: bytes | None
    mp4: bytes | None
    metadata: dict[str, Any] = field(default_factory=dict)


def check_id(utterance_id: str) -> None:
    """Raise UserError unless the id can name a WebDataset sample: non-empty, without dots, white space or slashes."""
    if not utterance_id or any(c.isspace() or c in "./\\" for c in utterance_id) or len(utterance_id.encode()) > 90:
        raise UserError(
            f"utterance id {utterance_id!r}: WebDataset splits names at the first dot; "
            "use at most 90 bytes without dots, slashes and white space"
        )


class _Shard:
    """One open tar file. Knows the offset of each member's data."""

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter  # brings torch along, which reading a corpus does not need

        self.path = path
        self.utterances = 0
        self._file = path.open("xb")
        self._writer = TarWriter(self._file, user="root", group="root", mode=0o644, mtime=0, encoder=False)
        # Python's default writes names beyond ASCII in members of their own, which would move the data.
        self._writer.tarstream.format = tarfile.USTAR_FORMAT

    @property
    def size(self) -> int:
        """Bytes so far; the file itself lags behind, as it is written in large blocks."""
        return int(self._writer.tarstream.offset)

    def add(self, utterance_id: str, kind: str, data: bytes) -> tuple[int, int]:
        """Append a member; return (offset of its data, size) in bytes."""
        offset = self.size + tarfile.BLOCKSIZE  # after the header
        # One by one: of a whole sample, the writer would sort the members.
        self._writer.write({"__key__": utterance_id, kind: data})
        return offset, len(data)

    def close(self) -> dict[str, Any]:
        """Finish the archive; return its manifest entry."""
        self._writer.close()
        self._file.close()
        fsync(self.path)
        return {
            "file": self.path.name,
            "bytes": self.path.stat().st_size,
            "sha256": sha256_of(self.path),
            "utterances": self.utterances,
        }

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # such as a full disk: the file is thrown away
            self._writer.close()
        self._file.close()


class ShardWriter:
    """Writes one split: ``{split}-00000.tar``, ... and, on close, the index ``{split}.jsonl``.

    A new shard starts before an utterance that would follow ``max_utterances`` others or ``max_bytes`` bytes.
    Raises UserError for a bad or repeated id.
    """

    def __init__(self, directory: Path, split: str, max_utterances: int = 500, max_bytes: int = 512 << 20) -> None:
        self.directory, self.split = directory, split
        self.max_utterances, self.max_bytes = max_utterances, max_bytes
        self._shard: _Shard | None = None
        self._finished: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._ids: set[str] = set()
        self._samples = 0
        self._frames = 0

    def add(self, utterance: EncodedUtterance) -> None:
        """Append one utterance."""
        check_id(utterance.id)
        if utterance.id in self._ids:
            raise UserError(f"utterance id {utterance.id!r} occurs twice in split {self.split!r}; make ids unique")
        self._ids.add(utterance.id)
        shard = self._current_shard()
        contents = {
            "flac": utterance.flac,
            "mp4": utterance.mp4,
            "txt": utterance.text.encode(),
            "json": json.dumps(utterance.metadata, sort_keys=True).encode(),
        }
        places = {kind: shard.add(utterance.id, kind, data) for kind, data in contents.items() if data is not None}
        stored = [kind for kind in INDEXED_MEMBERS if kind in places]
        shard.utterances += 1
        self._samples += utterance.samples
        self._frames += utterance.frames
        line = {
            "id": utterance.id,
            "shard": shard.path.name,
            "text": utterance.text,
            "speaker": utterance.speaker,
            "samples": utterance.samples,
            "frames": utterance.frames,
            "members": {kind: places[kind] for kind in stored},
            "crc32": {kind: zlib.crc32(contents[kind] or b"") for kind in stored},
        }
        self._lines.append(json.dumps(line, ensure_ascii=False))

    def _current_shard(self) -> _Shard:
        shard = self._shard
        if shard is not None and (shard.utterances >= self.max_utterances or shard.size >= self.max_bytes):
            self._finish_shard()
            shard = None
        if shard is None:
            shard = self._shard = _Shard(self.directory / f"{self.split}-{len(self._finished):05d}.tar")
        return shard

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._finished.append(self._shard.close())
            self._shard = None

    def close(self) -> dict[str, Any]:
        """Finish the split; return its manifest entry. Raises UserError when it has no utterance."""
        if not self._lines:
            raise UserError(f"split {self.split!r} has no utterance; give it at least one or leave the split out")
        self._finish_shard()
        index = f"{self.split}.jsonl"
        write_text(self.directory / index, "".join(f"{line}\n" for line in self._lines))
        seconds = max(self._samples / SAMPLE_RATE, self._frames / FPS)
        return {
            "index": index,
            "utterances": len(self._lines),
            "seconds": round(seconds, 3),
            "shards": self._finished,
        }

    def abandon(self) -> None:
        """Close what is open without finishing it."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None


def manifest_text(
    name: str,
    settings: dict[str, Any],
    splits: dict[str, dict[str, Any]],
    geometry: str | None,
    viseme_names: list[str] | None = None,
) -> str:
    """The manifest of a corpus, from the entries that `ShardWriter.close` gives for its splits."""
    manifest = {
        "format": FORMAT,
        "name": name,
        "settings": settings,
        "sample_rate": SAMPLE_RATE,
        "fps": FPS,
        "geometry": geometry,
        "viseme_names": viseme_names,
        "splits": splits,
    }
    return json.dumps(manifest, indent=1) + "\n"


class CorpusWriter:
    """Writes a whole corpus and publishes it at once: a context manager around one `ShardWriter` per split.

    ``settings`` (JSON values) says how the corpus was made; ``viseme_names`` names the classes of the per-frame
    ``visemes`` lists in the metadata, if there are any; ``geometry`` names that of the crops, if it is known
    (`mome_dist.speech.geometry`). On an exception nothing appears under ``directory``.
    Where ``directory`` exists already when the corpus is complete, that one is kept (another process was faster).
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        settings: dict[str, Any],
        viseme_names: list[str] | None = None,
        max_utterances: int = 500,
        max_bytes: int = 512 << 20,
        geometry: str | None = None,
    ) -> None:
        self.directory = directory
        self._geometry = geometry
        self._name, self._settings, self._viseme_names = name, settings, viseme_names
        self._limits = (max_utterances, max_bytes)
        self._writers: dict[str, ShardWriter] = {}
        self._stack = ExitStack()

    def __enter__(self) -> CorpusWriter:
        sweep(self.directory.parent)
        self.working = self._stack.enter_context(aside(self.directory)) / "new"
        self.working.mkdir()
        return self

    def add(self, split: str, utterance: EncodedUtterance) -> None:
        """Append an utterance to a split (created on first use)."""
        if split not in self._writers:
            self._writers[split] = ShardWriter(self.working, split, *self._limits)
        self._writers[split].add(utterance)

    def finish(self) -> None:
        """Write indexes and manifest. Further files may be put into ``working`` until the context ends."""
        if not self._writers:
            raise UserError(f"{self.directory}: a corpus needs at least one utterance")
        splits = {split: writer.close() for split, writer in self._writers.items()}
        text = manifest_text(self._name, self._settings, splits, self._geometry, self._viseme_names)
        write_text(self.working / MANIFEST, text)

    def _publish(self) -> None:
        if not (self.working / MANIFEST).exists():
            self.finish()
        fsync(self.working)
        try:
            self.working.rename(self.directory)
        except OSError as error:
            if not (self.directory / MANIFEST).is_file():
                raise UserError(
                    f"{self.directory}: exists and holds no corpus ({error}); remove it or choose another directory"
                ) from error
        else:
            fsync(self.directory.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            try:
                if kind is None:
                    self._publish()
            finally:
                for writer in self._writers.values():
                    writer.abandon()
