"""The one spelling of texts, over all of Unicode."""

from __future__ import annotations

import random
import sys
import unicodedata

import pytest

from mome_dist.data.preparation.text import spell
from mome_dist.evaluation.wer import word_errors
from mome_dist.text import normalize

CATEGORIES = {c: unicodedata.category(c) for c in map(chr, range(sys.maxunicode + 1))}
ASSIGNED = [c for c, category in CATEGORIES.items() if category not in ("Cn", "Co")]
ODD = [c for c in ASSIGNED if CATEGORIES[c] != "Lo" or unicodedata.normalize("NFKC", c) != c]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("DON'T  stop", "don't stop"),
        ("don\u2019t", "don't"),
        ("well-known \u2014 or \u201cso\u201d", "well known or so"),
        ("' '' \n", ""),
        ("\u00c9t\u00e9 50% $3", "\u00e9t\u00e9 50 3"),
        ("\ufeffsoft\u00adhyphen zero\u200bwidth \u202bdirection\u202c", "softhyphen zerowidth direction"),
        ("a\0b\x85c\u2028d\x1ce\vf\ud800g", "a b c d e f g"),
        ("\u2026\ufb01ne", "fine"),
        ("5\u2033 na\u00a8ive", "5 na ive"),  # NFKC makes two primes, a space and a combining accent of them
        ("E\u0301 e\u00ad\u0301 \u0301e", "\u00e9 \u00e9 e"),
        ("\u0149 \u2764\ufe0f 5\u339e", "'n 5km"),
        ("\u0130\u0331", "i\u0331\u0307"),  # lower case has another order of marks
    ],
)
def test_normaliser(text: str, expected: str) -> None:
    assert normalize(text) == expected
    assert normalize(expected) == expected


@pytest.mark.parametrize(
    "apostrophe", "`\u00b4\u02b9\u02bb\u02bc\u02ca\u02cb\u1ffd\u2018\u2019\u201b\u2032\uff07\uff40"
)
def test_whatever_stands_for_an_apostrophe_is_one(apostrophe: str) -> None:
    text = f"IT{apostrophe}S"
    assert normalize(text) == spell(text) == "it's"
    assert word_errors("it's", text).errors == 0
    assert word_errors("it's", "its").substitutions == 1


def test_format_and_control_characters_are_no_part_of_words() -> None:
    for category, expected in (("Cf", "ab"), ("Cc", "a b"), ("Zl", "a b"), ("Zp", "a b"), ("Zs", "a b")):
        found = [character for character in ODD if CATEGORIES[character] == category]
        assert found and {normalize(f"a{character}b") for character in found} == {expected}


def test_what_is_normalised_stays_so_for_every_character() -> None:
    once = normalize(" ".join(ASSIGNED))
    assert normalize(once) == once
    once = normalize("".join(f" {character}a '{character} A\u0331{character}" for character in ODD))
    assert normalize(once) == once


def test_what_is_normalised_stays_so_in_any_order() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choice(rng.choice((ODD, "\u0301\u0327\u0345", "abc\u03a3S' -"))) for _ in range(12))
        once = normalize(text)
        assert normalize(once) == once == spell(once), ascii(text)
