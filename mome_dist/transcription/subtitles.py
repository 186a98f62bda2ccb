"""Transcripts as files: text, JSON, subtitles (SubRip and WebVTT) and NIST's CTM.

Subtitles are written here: pysubs2 takes braces in a text for styling and drops what is in them, and webvtt-py does so
with angle brackets. Tests read them with parsers of others.
"""

from __future__ import annotations

import html
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


def _blocks(transcript: Transcript, point: str, written: Callable[[str], str] = str) -> Iterator[str]:
    shown = [cue for segment in transcript.segments for cue in cues(segment.words)]
    for number, (start, end, text) in enumerate(shown, 1):
        first = round(start * 1000)
        last = max(round(end * 1000), first + 1)  # a cue of no length would never be seen
        yield f"{number}\n{_clock(first, point)} --> {_clock(last, point)}\n{written(text)}\n"


def _clock(milliseconds: int, point: str) -> str:
    seconds, thousandths = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{thousandths:03}"


def _webvtt(transcript: Transcript) -> str:
    # What a cue says is markup, and a line with an arrow would be a time.
    return "\n".join(["WEBVTT\n", *_blocks(transcript, ".", lambda text: html.escape(text, quote=False))])


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
    "srt": lambda transcript: "\n".join(_blocks(transcript, ",")),
    "vtt": _webvtt,
    "ctm": _ctm,
}
"""What writes a transcript, by the ending of its file."""
