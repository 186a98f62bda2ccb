"""Transcripts as files: text, JSON, subtitles (SubRip and WebVTT, written by pysubs2) and NIST's CTM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mome_dist.transcription.results import Segment, Transcript, Word

# Of Netflix's and the BBC's guides for subtitles: two lines of at most 42 characters, for at most seven seconds.
LINE, LINES, CUE_SECONDS = 42, 2, 7.0
GAP = 0.8  # seconds without a word after which a new cue begins


def record(transcript: Transcript) -> dict[str, Any]:
    """A transcript as JSON has it."""
    return {
        "file": str(transcript.path),
        "seconds": round(transcript.seconds, 3),
        "text": transcript.text,
        "notes": list(transcript.notes),
        "segments": [_segment(segment) for segment in transcript.segments],
    }


def _segment(segment: Segment) -> dict[str, Any]:
    said = segment.said
    return {
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": said.text,
        "view": str(said.view),
        "confidence": None if said.confidence is None else round(said.confidence, 4),
        "complete": said.complete,
        "notes": list(said.notes),
        "aligned": segment.aligned,
        "words": [
            {"text": word.text, "start": round(word.start, 3), "end": round(word.end, 3)} for word in segment.words
        ],
    }


def cues(words: Sequence[Word]) -> Iterator[tuple[float, float, str]]:
    """Words as subtitles: start, end, and one or two lines."""
    held: list[Word] = []
    for word in words:
        if held and (
            _lines([*held, word]) > LINES or word.end - held[0].start > CUE_SECONDS or word.start - held[-1].end > GAP
        ):
            yield _cue(held)
            held = []
        held.append(word)
    if held:
        yield _cue(held)


def _wrapped(words: Sequence[Word]) -> list[str]:
    """Lines of whole words; a word that is longer than a line has one for itself."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word.text) <= LINE:
            lines[-1] += f" {word.text}"
        else:
            lines.append(word.text)
    return lines


def _lines(words: Sequence[Word]) -> int:
    return len(_wrapped(words))


def _cue(words: Sequence[Word]) -> tuple[float, float, str]:
    return words[0].start, words[-1].end, "\n".join(_wrapped(words))


def _subtitles(transcript: Transcript, form: str) -> str:
    from pysubs2 import SSAEvent, SSAFile

    file = SSAFile()
    for segment in transcript.segments:
        for start, end, text in cues(segment.words):
            # A cue of no length would never be seen.
            event = SSAEvent(start=round(start * 1000), end=max(round(end * 1000), round(start * 1000) + 1))
            event.plaintext = text
            file.append(event)
    return file.to_string(form)


def _ctm(transcript: Transcript) -> str:
    name = "_".join(transcript.path.stem.split())
    lines = [
        f"{name} 1 {word.start:.2f} {max(word.end - word.start, 0.01):.2f} {word.text}"
        for segment in transcript.segments
        for word in segment.words
    ]
    return "".join(f"{line}\n" for line in lines)


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "txt": lambda transcript: "".join(f"{segment.said.text}\n" for segment in transcript.segments),
    "json": lambda transcript: json.dumps(record(transcript), indent=2, ensure_ascii=False) + "\n",
    "jsonl": lambda transcript: "".join(
        json.dumps(_segment(segment), ensure_ascii=False) + "\n" for segment in transcript.segments
    ),
    "srt": lambda transcript: _subtitles(transcript, "srt"),
    "vtt": lambda transcript: _subtitles(transcript, "vtt"),
    "ctm": _ctm,
}
"""What writes a transcript, by the ending of its file."""
