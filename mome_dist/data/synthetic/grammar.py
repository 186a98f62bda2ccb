"""The command grammar: one word from each of seven slots, such as "keep white lamp under church june twice".

The form follows the GRID corpus (Cooke et al., 2006): fixed positions, few words in each. Words that compete in one
slot differ in their visemes and in their sounds, so that lip reading is possible in principle. Most words have one
syllable: at a natural pace a clip lasts two to three seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mome_dist.errors import UserError

SLOTS: tuple[tuple[str, ...], ...] = (
    ("keep", "fetch", "wash", "lift", "push", "throw"),
    ("white", "green", "brown", "black", "gold", "pink"),
    ("box", "fish", "wheel", "shoe", "lamp", "rope", "cheese", "knife"),
    ("under", "through", "near", "above", "past"),
    ("lake", "church", "farm", "house", "bridge", "shop"),
    ("spring", "summer", "dawn", "june", "march", "friday"),
    ("softly", "alone", "now", "again", "twice"),
)
VOCABULARY: tuple[str, ...] = tuple(word for slot in SLOTS for word in slot)
SENTENCES = math.prod(len(slot) for slot in SLOTS)


def _deck(words: tuple[str, ...], rng: np.random.Generator) -> Iterator[str]:
    """Endless draw in which every word comes equally often: shuffled decks one after another."""
    while True:
        yield from (words[i] for i in rng.permutation(len(words)))


def draw_sentences(count: int, seed: int) -> list[str]:
    """Draw ``count`` different sentences with balanced words; a longer draw begins with a shorter one.

    Raises UserError when the grammar has too few sentences.
    """
    if count > SENTENCES // 4:
        raise UserError(f"{count} sentences asked for; the grammar gives at most {SENTENCES // 4} different ones")
    rng = np.random.default_rng(seed)
    decks = [_deck(slot, child) for slot, child in zip(SLOTS, rng.spawn(len(SLOTS)), strict=True)]
    sentences: dict[str, None] = {}
    while len(sentences) < count:
        sentences[" ".join(next(deck) for deck in decks)] = None
    return list(sentences)
