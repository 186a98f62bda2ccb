"""A preparation cut into portions that are done independently, in any order, by any process, any number of times.

A portion is a run of clips of one split and becomes one shard (more where it would grow too large). Its bytes follow
from its clips alone. So a preparation that was killed goes on with the portions that it lacks, parts of a job array
share the portions by number, and whoever does the last one joins them into a corpus. Beside the corpus ``OUT``:

    OUT.preparing/plan.json            what is being prepared; every process must want the same
    OUT.preparing/portions/NAME.json   of a finished portion, written last: its shards, its rejections
    OUT.preparing/corpus/              the shards; renamed to ``OUT`` when it is complete
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from mome_dist.data.corpus import Corpus
from mome_dist.data.preparation.clips import SPLITS, Clip
from mome_dist.data.preparation.settings import PreparationSettings
from mome_dist.data.preparation.utterances import ClipPreparer, Note, Rejection
from mome_dist.data.shards import MANIFEST, ShardWriter, manifest_text
from mome_dist.errors import UserError
from mome_dist.files import aside, fsync, sweep, write_json, write_once, write_text
from mome_dist.ownership import owned

REJECTED, NOTED = "rejected.jsonl", "noted.jsonl"


class Watch(Protocol):
    """Is told how a portion gets on."""

    def starts(self, clip: Clip) -> None:
        """A clip is next."""

    def ends(self, frames: int) -> None:
        """That clip is done; it had so many frames."""


@dataclass(frozen=True)
class Portion:
    """Clips of one split that are stored together."""

    name: str
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class Preparation:
    """All there is to do for one corpus.

    Attributes:
        out: directory of the corpus.
        settings: see there.
        clips: in the order in which they are stored within their splits.
        left_out: rejections that are known before any clip is read.
    """

    out: Path
    settings: PreparationSettings
    clips: Sequence[Clip]
    left_out: Sequence[Rejection] = ()

    @property
    def working(self) -> Path:
        return self.out.with_name(f"{self.out.name}.preparing")

    @property
    def corpus(self) -> Path:
        return self.working / "corpus"

    @cached_property
    def portions(self) -> list[Portion]:
        """All portions, in the order of the corpus."""
        found, size = [], self.settings.clips_per_shard
        for split in SPLITS:
            clips = [clip for clip in self.clips if clip.split == split]
            for number, first in enumerate(range(0, len(clips), size)):
                found.append(Portion(f"{split}-{number:05d}", tuple(clips[first : first + size])))
        return found

    @cached_property
    def description(self) -> dict[str, Any]:
        """Settings and a hash of all clips, those left out as well: two equal ones give the same corpus."""
        digest = hashlib.sha256()
        for entry in [*(astuple(clip) for clip in self.clips), *self.left_out]:
            digest.update(repr(tuple(str(value) for value in entry)).encode())
        return {**self.settings.as_dict(), "clips": len(self.clips), "clips_sha256": digest.hexdigest()}

    def is_done(self) -> bool:
        """Whether the corpus is there.

        Raises:
            UserError: something else is there.
        """
        if not self.out.exists():
            return False
        if not (self.out / MANIFEST).is_file():
            raise UserError(f"{self.out}: exists and holds no corpus; remove it or choose another OUT")
        if Corpus.open(self.out).manifest.get("settings") != self.description:
            raise UserError(f"{self.out}: holds a corpus of other clips or settings; remove it or choose another OUT")
        return True

    def begin(self) -> None:
        """Make the working directory, or find it.

        Raises:
            UserError: one of other clips or settings is there.
        """
        self.corpus.mkdir(parents=True, exist_ok=True)
        (self.working / "portions").mkdir(exist_ok=True)
        sweep(self.working)
        plan = write_once(self.working / "plan.json", json.dumps(self.description, indent=2, ensure_ascii=False))
        if json.loads(plan) != self.description:
            raise UserError(
                f"{self.working}: begun with other clips or settings; use the same ones, or remove it to start anew"
            )

    def missing(self) -> list[Portion]:
        """Portions that are not done."""
        return [portion for portion in self.portions if not self._record(portion).is_file()]

    def _record(self, portion: Portion) -> Path:
        return self.working / "portions" / f"{portion.name}.json"

    def do(self, portion: Portion, preparer: ClipPreparer, watch: Watch) -> None:
        """Prepare a portion. Its record appears when its shards are on disk.

        Two processes may do the same one: they write the same bytes. If meanwhile the other one has finished the whole
        corpus and cleared away the working directory, nothing is left to do.
        """
        try:
            self._do(portion, preparer, watch)
        except FileNotFoundError:
            if not self.is_done():
                raise

    def _do(self, portion: Portion, preparer: ClipPreparer, watch: Watch) -> None:
        rejections: list[Rejection] = []
        notes: list[Note] = []
        record: dict[str, Any] = {"shards": [], "lines": "", "utterances": 0, "seconds": 0.0}
        with aside(self.working / portion.name) as scratch:
            writer = ShardWriter(scratch, portion.name, max_utterances=1 << 62)
            try:
                for clip in portion.clips:
                    watch.starts(clip)
                    prepared = preparer.prepare(clip)
                    for utterance in prepared.utterances:
                        writer.add(utterance)
                    rejections += prepared.rejections
                    notes += prepared.notes
                    record["utterances"] += len(prepared.utterances)
                    watch.ends(prepared.frames)
                if record["utterances"]:
                    entry = writer.close()
                    record |= {key: entry[key] for key in ("shards", "seconds")}
                    record["lines"] = (scratch / entry["index"]).read_text(encoding="utf-8")
            finally:
                writer.abandon()
            for shard in record["shards"]:
                (scratch / shard["file"]).rename(self.corpus / shard["file"])
        fsync(self.corpus)
        told = {"rejections": [rejection._asdict() for rejection in rejections], "notes": [n._asdict() for n in notes]}
        write_json(self._record(portion), {**record, **told})

    def finish(self) -> bool:
        """Join all portions and publish the corpus; return whether that was possible (or done by someone else).

        Raises:
            UserError: no clip of a split could be used.
        """
        if not self.out.exists():
            if self.missing() and not self.is_done():
                return False
            with owned(self.working, "joining the portions", "choose another OUT", patience_seconds=math.inf):
                if not self.is_done():
                    self._join()
                    self.corpus.rename(self.out)
                    fsync(self.out.parent)
        shutil.rmtree(self.working, ignore_errors=True)
        return True

    def _join(self) -> None:
        splits: dict[str, dict[str, Any]] = {}
        rejections, notes = [rejection._asdict() for rejection in self.left_out], []
        for split in SPLITS:
            records = [
                json.loads(self._record(portion).read_text(encoding="utf-8"))
                for portion in self.portions
                if portion.name.startswith(f"{split}-")
            ]
            rejected = [rejection for record in records for rejection in record["rejections"]]
            rejections += rejected
            notes += [note for record in records for note in record["notes"]]
            if not records:
                continue
            if not any(record["utterances"] for record in records):
                raise UserError(
                    f"no clip of the {split} split could be used; the first one: {rejected[0]['name']}: "
                    f"{rejected[0]['detail']}. Mend that, remove {self.working} and start again"
                )
            write_text(self.corpus / f"{split}.jsonl", "".join(record["lines"] for record in records))
            splits[split] = {
                "index": f"{split}.jsonl",
                "utterances": sum(record["utterances"] for record in records),
                "seconds": round(sum(record["seconds"] for record in records), 3),
                "shards": [shard for record in records for shard in record["shards"]],
            }
        for name, entries in ((REJECTED, rejections), (NOTED, notes)):
            write_text(self.corpus / name, "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries))
        write_text(
            self.corpus / MANIFEST, manifest_text(self.out.name, self.description, splits, self.settings.geometry)
        )
        Corpus.open(self.corpus)  # what cannot be read is not published
        fsync(self.corpus)
