"""Babble noise: several other speakers of the corpus talking at once, mixed in at a signal-to-noise ratio.

Noise is a pure function of (seed, utterance id, draw): an evaluation hears the same noise in every run, on every rank
and in any order, and training asks for another ``draw`` every epoch. ``snr=None`` means no noise at all; ``snr=0.0``
means noise as loud as speech. The ratio is of mean powers over the whole clip, pauses included.
"""

from __future__ import annotations

import zlib

import numpy as np

from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import Audio
from mome_dist.errors import UserError


def mix_at_snr(speech: Audio, noise: Audio, snr: float | None) -> Audio:
    """Add ``noise`` to ``speech`` (both float32 [samples]) at ``snr`` dB; None returns the speech as it is.

    Where the sum would leave [-1, 1] it is turned down as a whole, which keeps the ratio. Silent speech or silent noise
    has no ratio: the speech is returned as it is.
    """
    if snr is None:
        return speech
    if speech.shape != noise.shape:
        raise ValueError(f"speech has {speech.shape} samples, noise {noise.shape}")
    speech_power = float(np.mean(np.square(speech, dtype=np.float64)))
    noise_power = float(np.mean(np.square(noise, dtype=np.float64)))
    if speech_power == 0.0 or noise_power == 0.0:
        return speech
    gain = np.sqrt(speech_power / noise_power * 10 ** (-snr / 10))
    mixed = speech + np.float32(gain) * noise
    return np.asarray(mixed / max(1.0, float(np.abs(mixed).max())), np.float32)


class Babble:
    """Babble from one split of a corpus (take "train" also in evaluation: test speech must not be its own noise).

    ``talkers`` voices of equal power speak at once, none of them the utterance's own speaker. Raises UserError when the
    split has no other speaker.
    """

    def __init__(self, corpus: Corpus, split: str = "train", talkers: int = 8, seed: int = 0) -> None:
        if talkers < 1:
            raise UserError(f"babble of {talkers} talkers; use 1 or more")
        self.corpus, self.talkers, self.seed = corpus, talkers, seed
        self._by_speaker: dict[str, list[Utterance]] = {}
        for utterance in corpus.split(split):
            self._by_speaker.setdefault(utterance.speaker, []).append(utterance)

    def noise(self, utterance: Utterance, draw: int = 0) -> Audio:
        """Babble as long as the utterance: float32 [samples], mean power of about 1."""
        rng = np.random.default_rng([self.seed, zlib.crc32(utterance.id.encode()), draw])
        speakers = sorted(self._by_speaker.keys() - {utterance.speaker})
        if not speakers:
            raise UserError(
                f"{self.corpus.directory}: no speaker but {utterance.speaker!r} to make babble from; take another split"
            )
        chosen = rng.choice(speakers, self.talkers, replace=len(speakers) < self.talkers)
        total = np.zeros(utterance.samples, np.float32)
        for speaker in chosen:
            clips = self._by_speaker[str(speaker)]
            clip = self.corpus.audio(clips[rng.integers(len(clips))])
            start = int(rng.integers(len(clip)))
            talk = np.resize(np.roll(clip, -start), utterance.samples)  # repeats what is too short
            total += talk / max(float(np.sqrt(np.mean(np.square(talk)))), 1e-6)
        return total / np.float32(np.sqrt(self.talkers))

    def add(self, speech: Audio, utterance: Utterance, snr: float | None, draw: int = 0) -> Audio:
        """``speech`` of ``utterance`` with babble at ``snr`` dB (see `mix_at_snr`)."""
        return speech if snr is None else mix_at_snr(speech, self.noise(utterance, draw), snr)
