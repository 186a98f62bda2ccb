"""Babble noise: several other speakers of the corpus talking at once."""

from __future__ import annotations

import numpy as np

from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import Audio
from mome_dist.data.noise.source import Origin
from mome_dist.data.seeding import utterance_rng
from mome_dist.errors import UserError


class Babble:
    """Babble from one split of a corpus (take "train" also in evaluation: test speech must not be its own noise).

    ``talkers`` voices of equal power speak at once, none of them the utterance's own speaker. Raises UserError when the
    split has no other speaker, or no sound.
    """

    def __init__(self, corpus: Corpus, split: str = "train", talkers: int = 8, seed: int = 0) -> None:
        if talkers < 1:
            raise UserError(f"babble of {talkers} talkers; use 1 or more")
        self.corpus, self.talkers, self.seed = corpus, talkers, seed
        self._utterances: dict[str, Utterance] = {}
        self._by_speaker: dict[str, list[Utterance]] = {}
        for utterance in corpus.split(split):
            if utterance.samples:
                self._utterances[utterance.id] = utterance
                self._by_speaker.setdefault(utterance.speaker, []).append(utterance)
        if not self._by_speaker:
            raise UserError(f"{corpus.directory}: split {split!r} has no sound to make babble from; take another split")

    def noise(self, utterance: Utterance, draw: int = 0) -> Audio:
        """Babble as long as the utterance: float32 [samples], mean power of about 1."""
        total = np.zeros(utterance.samples, np.float32)
        for name, offset in self.origins(utterance, draw):
            clip = self.corpus.audio(self._utterances[name])
            talk = np.resize(np.roll(clip, -offset), utterance.samples)  # repeats what is too short
            total += talk / max(float(np.sqrt(np.mean(np.square(talk)))), 1e-6)
        return total / np.float32(np.sqrt(self.talkers))

    def origins(self, utterance: Utterance, draw: int = 0) -> list[Origin]:
        """The clip of each talker, and the sample that it starts at."""
        rng = utterance_rng(self.seed, "babble", utterance.id, draw)
        speakers = sorted(self._by_speaker.keys() - {utterance.speaker})
        if not speakers:
            raise UserError(
                f"{self.corpus.directory}: no speaker but {utterance.speaker!r} to make babble from; take another split"
            )
        origins = []
        for speaker in rng.choice(speakers, self.talkers, replace=len(speakers) < self.talkers):
            clips = self._by_speaker[str(speaker)]
            clip = clips[rng.integers(len(clips))]
            origins.append(Origin(clip.id, int(rng.integers(clip.samples))))
        return origins
