"""Cuts of lhotse, one JSON object each. A cut is read whole, or what is not understood of it is named.

What changes the sound, the pictures or the text and is not applied here (transforms, a part of the channels, mixtures)
is an error, and so is a key that this reader does not know: whoever made the list has to decide. A cut whose own
figures or texts do not fit together is left out by name.

Format: https://github.com/lhotse-speech/lhotse, its ``MonoCut``, ``MultiCut``, ``Recording``, ``AudioSource`` and
``SupervisionSegment``. Times are seconds: of a cut, from the start of its recording; of a supervision, from the start
of its cut.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mome_dist.data.media import FPS
from mome_dist.data.preparation.clips import Clip, below
from mome_dist.data.preparation.utterances import NO_TEXT, Rejection
from mome_dist.errors import UserError
from mome_dist.text_files import parse_json

BAD_CUT = "cut does not fit"

_TOLERANCE = 1 / FPS  # seconds, of times that other programs have rounded
_MOST = 1e15

_TYPES = ("MonoCut", "MultiCut", "Cut")  # the last is what old versions call the first
_KEYS = {
    "cut": {"id", "type", "start", "duration", "channel", "recording", "supervisions"},
    "recording": {"id", "sources", "sampling_rate", "num_samples", "duration", "channel_ids", "transforms"},
    "source": {"type", "channels", "source", "video"},
    "supervision": {"id", "recording_id", "start", "duration", "channel", "text", "speaker"},
}
# Said about the same sound and text: these neither add to nor change what is read here.
_HARMLESS_KEYS = {
    "cut": {"features", "custom"},
    "recording": {"custom"},
    "source": set[str](),
    "supervision": {"alignment", "custom", "gender", "language"},
}


class _LeftOutError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Object:
    """A JSON object of a known kind. A key with null is absent."""

    def __init__(self, value: Any, kind: str, where: str) -> None:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {kind} is {value!r:.50}, not an object")
        name = value.get("id")
        self.where = f"{where}: {kind}" if name is None else f"{where}: {kind} {name!r:.80}"
        self._values = {key: entry for key, entry in value.items() if entry is not None}
        for key in self._values:
            if key not in _KEYS[kind] | _HARMLESS_KEYS[kind]:
                raise UserError(
                    f"{self.where} has {key!r}, which is not understood and could change what is heard, seen or said: "
                    "remove it, or apply it and save the cuts again"
                )

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._values.get(key)

    def _wrong(self, key: str, wanted: str) -> UserError:
        found = f"{key}={self._values[key]!r:.50}" if key in self._values else f"no {key!r}"
        return UserError(f"{self.where} has {found}; it must be {wanted}")

    def name(self, key: str) -> str:
        """A string that is not empty, or a whole number as one."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self._wrong(key, "a string")
        return str(value)

    def text(self, key: str) -> str | None:
        """A string, or None where there is none but white space."""
        value = self.get(key)
        if not isinstance(value, str | None):
            raise self._wrong(key, "a string")
        return value if value and value.strip() else None

    def number(self, key: str, least: float, *, above: bool = False) -> float:
        """A finite number that is at least ``least``, or more than that."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < _MOST:
            raise self._wrong(key, f"a number of at least {least:g}")
        if above and value == least:
            raise self._wrong(key, f"more than {least:g}")
        return float(value)

    def items(self, key: str) -> list[Any]:
        """The values of a list."""
        value = self.get(key)
        if not isinstance(value, list):
            raise self._wrong(key, "a list")
        return value

    def channels(self, key: str) -> frozenset[int] | None:
        """Numbers of channels, given as one or as a list; None where it does not say."""
        value = self.get(key)
        numbers = value if isinstance(value, list) else [value]
        if value is not None and any(isinstance(one, bool) or not isinstance(one, int) for one in numbers):
            raise self._wrong(key, "a whole number or a list of them")
        return None if value is None else frozenset(numbers)


class _Supervision(NamedTuple):
    """Text of a part of a cut."""

    start: float
    end: float
    text: str
    speaker: str | None


def read_cut(line: str, where: str, split: str, root: Path) -> Clip | Rejection:
    """The clip of one line; or, where its figures or texts do not fit together, why it is left out.

    Args:
        where: file and line, as messages begin.
        root: folder that its paths are below.

    Raises:
        UserError: it is no cut, or one that is not understood.
    """
    value = parse_json(line, where)
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is not None and kind not in _TYPES:
        raise UserError(
            f"{where}: a cut of type {kind!r}; only {_TYPES[0]} and {_TYPES[1]} are read: save what it is made of as a "
            "file of its own"
        )
    cut = _Object(value, "cut", where)
    name, start, seconds = cut.name("id"), cut.number("start", 0), cut.number("duration", 0, above=True)
    recording = _Object(cut.get("recording"), "recording", where)
    media, audio = _files(cut, recording, where, root)
    try:
        _check_times(recording, start + seconds)
        said = _said(cut, recording, where, seconds)
    except _LeftOutError as error:
        return Rejection(name, split, error.reason, str(error))
    return Clip(
        name=name,
        split=split,
        speaker=said[0].speaker or media.parent.name,
        media=media,
        audio=audio,
        text=" ".join(each.text for each in said),
        start=start,
        seconds=seconds,
    )


def _files(cut: _Object, recording: _Object, where: str, root: Path) -> tuple[Path, Path | None]:
    """The file with the pictures, and the one with the sound if that is another.

    The sound of a file is the mean of its channels, so a cut must have all of them.
    """
    if transforms := recording.get("transforms"):
        raise UserError(
            f"{recording.where} has transforms={transforms!r:.80}, which are not applied: take such cuts out, or save "
            "the transformed film as a file of its own"
        )
    sources = [_Object(value, "source", where) for value in recording.items("sources")]
    for source in sources:
        if (kind := source.name("type")) != "file":
            raise UserError(f"{where}: a source of type {kind!r}; only files are read, no URL and no command")
    chosen = cut.channels("channel")
    seen = sources if len(sources) == 1 else [source for source in sources if "video" in source]
    heard = []
    for source in sources:
        there = source.channels("channels")
        if there is None or chosen is None or there & chosen:
            heard += [source] if there != frozenset() else []
    if len(seen) != 1 or len(heard) != 1:
        raise UserError(
            f"{recording.where} has {len(sources)} sources, {len(seen)} of them with 'video' and {len(heard)} with "
            f"channel {cut.get('channel')} of the cut; exactly one of each is understood"
        )
    there = heard[0].channels("channels")
    if there is not None and chosen is not None and there != chosen:
        raise UserError(
            f"{cut.where} has channel {cut.get('channel')} of channels {sorted(there)}, but the sound is taken as the "
            "mean of all: save what is meant as a file of its own"
        )
    paths = [below(root, source.name("source"), where) for source in (seen[0], heard[0])]
    return paths[0], paths[1] if paths[1] != paths[0] else None


def _check_times(recording: _Object, end: float) -> None:
    """Leave out a cut that ends at ``end`` seconds if its recording does not last as long, or contradicts itself."""
    told = []
    if "duration" in recording:
        told.append(recording.number("duration", 0, above=True))
    if "num_samples" in recording and "sampling_rate" in recording:
        told.append(recording.number("num_samples", 0) / recording.number("sampling_rate", 1))
    if not told:
        return
    if max(told) - min(told) > _TOLERANCE:
        raise _LeftOutError(
            BAD_CUT, f"{recording.where} has a duration of {told[0]:g} s, but samples for {told[1]:g} s"
        )
    if end > told[0] + _TOLERANCE:
        raise _LeftOutError(BAD_CUT, f"{recording.where} lasts {told[0]:g} s, and the cut ends at {end:g} s")


def _said(cut: _Object, recording: _Object, where: str, seconds: float) -> list[_Supervision]:
    """What one speaker says in a cut, in the order of time. A lone supervision without times is of the whole cut."""
    found = []
    values = cut.items("supervisions") if "supervisions" in cut else []
    for value in values:
        told = _Object(value, "supervision", where)
        _check_belongs(told, cut, recording)
        start, end = 0.0, seconds
        if len(values) > 1 or "start" in told or "duration" in told:
            start = told.number("start", -_MOST)
            end = start + told.number("duration", 0, above=True)
        if start < -_TOLERANCE or end > seconds + _TOLERANCE:
            raise _LeftOutError(BAD_CUT, f"{told.where} is from {start:g} to {end:g} s of a cut of {seconds:g} s")
        if (text := told.text("text")) is None:
            raise _LeftOutError(NO_TEXT, f"{told.where} has no text")
        found.append(_Supervision(start, end, text, told.name("speaker") if "speaker" in told else None))
    if not found:
        raise _LeftOutError(NO_TEXT, f"{cut.where} has no supervision")
    found.sort(key=lambda each: each.start)
    if any(later.start < earlier.end - _TOLERANCE for earlier, later in pairwise(found)):
        raise _LeftOutError(BAD_CUT, f"{cut.where} has supervisions at the same time; a clip is of one voice")
    if len(speakers := sorted({each.speaker or "unknown" for each in found})) > 1:
        raise _LeftOutError(BAD_CUT, f"{cut.where} has speakers {', '.join(speakers)}; a clip is of one")
    return found


def _check_belongs(supervision: _Object, cut: _Object, recording: _Object) -> None:
    """Refuse a supervision of another recording, or of channels that the cut has not."""
    of, there = supervision.get("recording_id"), recording.get("id")
    if None not in (of, there) and of != there:
        raise UserError(f"{supervision.where} is of recording {of!r}, but the cut of {there!r}: give each cut its own")
    spoken, heard = supervision.channels("channel"), cut.channels("channel")
    if spoken is not None and heard is not None and not spoken & heard:
        raise UserError(
            f"{supervision.where} is of channel {supervision.get('channel')}, but the cut of {cut.get('channel')}: "
            "take one of them out"
        )
