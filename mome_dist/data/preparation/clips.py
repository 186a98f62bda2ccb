"""What a data set names: clips with their text, before any of it is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath

from mome_dist.errors import UserError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)

_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST_ID = 80  # a segment's number comes after it

# Names that can be told from their ids: no "-" of their own, and no end like the number of another clip's segment.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(/(?![0-9]{3,4}$)[A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class Clip:
    """One clip of a data set.

    Attributes:
        name: unique in the data set, for people: usually its path below the root, without the suffix.
        split: one of `SPLITS`.
        speaker: who speaks, or the closest that the data set tells (its folder).
        media: file with the video, and with the audio unless that is elsewhere.
        audio: file with the audio alone, or None.
        text: what is said, as written; None where ``text_file`` holds it.
        text_file: text file in the layout of LRS2 and LRS3.
        start, seconds: the part of the file that is meant; to its end where ``seconds`` is None.
        listed_frames, listed_samples: pictures at 25 fps and samples at 16 kHz that its list says this part has; None
            where the list does not say.
    """

    name: str
    split: str
    speaker: str
    media: Path
    audio: Path | None = None
    text: str | None = None
    text_file: Path | None = None
    start: float = 0.0
    seconds: float | None = None
    listed_frames: int | None = None
    listed_samples: int | None = None

    @property
    def id(self) -> str:
        """The name in the form that shards can hold, ``/`` as ``-``. Where another name or a segment of another clip
        could have the same, a hash comes after ``--``, so that different names have different ids."""
        if _PLAIN_NAME.fullmatch(self.name) and len(self.name) <= _LONGEST_ID:
            return self.name.replace("/", "-")
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:16]
        return f"{_NOT_IN_IDS.sub('-', self.name).strip('-')[: _LONGEST_ID - 18]}--{digest}"


def below(root: Path, named: str, where: str) -> Path:
    """The file that a list names, which must be a path below ``root``.

    Raises:
        UserError: it is a URL, a command, or leads out of ``root``; ``where`` says in which line it is.
    """
    if "://" in named or named.startswith(("pipe:", "fd:")) or "|" in named or "\0" in named:
        raise UserError(f"{where}: {named!r} is no path of a file; URLs and commands in lists are not followed")
    path = PurePosixPath(named)
    if path.is_absolute():
        try:
            path = path.relative_to(root.absolute())
        except ValueError:
            raise UserError(
                f"{where}: {named!r} is not below {root}; give the --root that the list was made for"
            ) from None
    if not path.parts or ".." in path.parts:
        raise UserError(f"{where}: {named!r} leads out of {root}")
    return root / path


def check_clips(clips: Sequence[Clip]) -> None:
    """Refuse clips that would spoil each other or an evaluation.

    Raises:
        UserError: a name is no text, an id occurs twice, or a file of the test split is also in another one.
    """
    seen: dict[str, str] = {}
    for clip in clips:
        if any("\ud800" <= character <= "\udfff" for character in f"{clip.name}{clip.speaker}"):
            raise UserError(f"clip {clip.name!a}: the name of a file or folder is not UTF-8; rename it")
        if clip.id in seen:
            raise UserError(f"clip {clip.name!r} occurs twice (as {seen[clip.id]!r} before); keep one of them")
        seen[clip.id] = clip.name
    resolve = cache(Path.resolve)  # lists may write one folder differently; there are fewer folders than clips
    files = [resolve(clip.media.parent) / clip.media.name for clip in clips]
    test = {file for clip, file in zip(clips, files, strict=True) if clip.split == TEST}
    for clip, file in zip(clips, files, strict=True):
        if clip.split != TEST and file in test:
            raise UserError(
                f"{clip.media} is in the {clip.split} split and in the test split; a test must be unseen: "
                "take it out of one of the lists"
            )


def hold_out_speakers(clips: Iterable[Clip], share: float, eligible: str) -> tuple[list[Clip], list[Clip]]:
    """Take whole speakers out of the training split for validation; the test split stays untouched.

    Speakers come in the order of a hash of their names, so that the choice depends on nothing but who there is, until
    ``share`` of the clips whose names start with ``eligible`` are held out. Their other clips train nothing either.

    Returns:
        All clips, those of the validation split with it; and the clips that are left out.

    Raises:
        UserError: fewer than two speakers could be chosen from.
    """
    clips = list(clips)
    counts: dict[str, int] = {}
    for clip in clips:
        if clip.split == TRAIN and clip.name.startswith(eligible):
            counts[clip.speaker] = counts.get(clip.speaker, 0) + 1
    everyone = {clip.speaker for clip in clips if clip.split == TRAIN}
    if not counts or len(everyone) < 2:
        raise UserError(
            f"{len(everyone)} speaker(s) to take a validation split from, which needs 2 or more: give a list of "
            "validation clips, or --validation-share 0 for none"
        )
    held: set[str] = set()
    wanted, number = max(1.0, share * sum(counts.values())), 0
    for speaker in sorted(counts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if number >= wanted or len(held) + 1 == len(everyone):
            break
        held.add(speaker)
        number += counts[speaker]
    kept, left_out = [], []
    for clip in clips:
        if clip.split != TRAIN or clip.speaker not in held:
            kept.append(clip)
        elif clip.name.startswith(eligible):
            kept.append(replace(clip, split=VALIDATION))
        else:
            left_out.append(clip)
    return kept, left_out
