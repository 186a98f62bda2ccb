"""One spelling of what is said: corpora hold it, and word errors are counted in it."""

from __future__ import annotations

import unicodedata

NORMALIZER = "lower case, no punctuation or invisible characters, apostrophes kept in one spelling"
"""Name of what `normalize` does, as written into results."""

# Quotation marks, primes, modifier letters and free-standing accents that are typed for an apostrophe: those that
# Unicode's table of confusable characters maps to it (UTS 39), without the letters and tones of other scripts.
_APOSTROPHES = frozenset(
    "'`\u00b4\u02b9\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u02ca\u02cb\u02f4\u0374\u0384\u055a\u05f3\u1fbd\u1fbf\u1fef"
    "\u1ffd\u1ffe\u2018\u2019\u201b\u2032\u2035\u275b\u275c\ua78b\ua78c\uff07\uff40"
)
_DOUBLE = frozenset("\u02ba\u02ee")  # letters to Unicode, but typed for quotation marks
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0").union(
    map(chr, [*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])  # variation selectors
)


class _Folding(dict[int, str]):
    """What each character becomes, worked out when it is first met.

    Args:
        spaces: first letters of the categories that become spaces.
    """

    def __init__(self, spaces: str) -> None:
        super().__init__()
        self._spaces = spaces

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character in _APOSTROPHES:
            folded = "'"
        elif category == "Cf" or character in _INVISIBLE:
            folded = ""
        elif category[0] in self._spaces or category in ("Cc", "Cs") or character in _DOUBLE:
            folded = " "
        else:
            folded = character
        self[code] = folded
        return folded


# Symbols wait: NFKC makes letters of some (the trade mark sign, square km). Accents and double primes do not, of which
# it would make a space with a combining accent, and two primes.
_BEFORE, _AFTER = _Folding("PZ"), _Folding("PZS")


def normalize(text: str) -> str:
    """Lower-case, punctuation, symbols and control characters replaced by spaces, what is invisible removed, every
    apostrophe in one spelling, single spaces; characters of one look in one form (NFKC).

    This is how LRS2 and LRS3 results are scored. A word needs more than apostrophes and accents. The result normalised
    again is the same.
    """
    folded = unicodedata.normalize("NFKC", text.translate(_BEFORE)).translate(_AFTER).lower()
    words = map(_without_stray_marks, unicodedata.normalize("NFKC", folded).split(" "))
    return " ".join(word for word in words if word)


def _without_stray_marks(word: str) -> str:
    """A word without the combining marks before its first letter: they belong to nothing."""
    for start, character in enumerate(word):
        if character != "'" and unicodedata.category(character)[0] != "M":
            return "'" * word[:start].count("'") + word[start:]
    return ""
