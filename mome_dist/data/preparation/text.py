"""Text files of LRS2 and LRS3, and the spelling that corpora hold."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from mome_dist.errors import UserError
from mome_dist.text import normalize
from mome_dist.text_files import lines_of

_TAG = re.compile(r"\{[^}]*\}|<[^>]*>")  # laughter {LG}, noises <...>: heard, but no words
_WORD_TABLE = "WORD START END"


class Word(NamedTuple):
    """A word as spelled in a corpus (empty for a noise), with its times in seconds."""

    text: str
    start: float
    end: float


class Transcript(NamedTuple):
    """What a clip says, and when, if that is known."""

    text: str
    words: tuple[Word, ...] | None


def spell(text: str) -> str:
    """Text as a corpus holds it, and as errors are counted: without tags, lower case, apostrophes kept."""
    return normalize(_TAG.sub(" ", text))


def read_transcript(path: Path) -> Transcript:
    """Read a text file of LRS2 or LRS3: ``Text: ...``, further ``Key: value`` lines, and where the clip is of the
    pre-training set a table ``WORD START END ASDSCORE``.

    Raises:
        UserError: the file cannot be read as text or has no ``Text:``, or a line of the table is none.
    """
    text: str | None = None
    words: list[Word] | None = None
    for number, line in enumerate(lines_of(path), 1):
        if words is not None:
            if line.strip():
                words.append(_word(f"{path}:{number}", line))
        elif line.startswith(_WORD_TABLE):
            words = []
        elif line.startswith("Text:"):
            if text is not None:
                raise UserError(f"{path}:{number}: a second 'Text: ...'; which one is said?")
            text = line.removeprefix("Text:")
    if text is None:
        raise UserError(f"{path} has no line 'Text: ...'")
    return Transcript(spell(text), None if words is None else tuple(words))


def _word(where: str, line: str) -> Word:
    fields = line.split()
    try:
        word = Word(spell(fields[0]), float(fields[1]), float(fields[2]))
    except (IndexError, ValueError):
        raise UserError(f"{where}: {line!r} is no WORD START END SCORE") from None
    if not 0 <= word.start <= word.end < math.inf:
        raise UserError(f"{where}: {line!r} ends before it starts, or never")
    return word
