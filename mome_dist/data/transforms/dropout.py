"""Modality dropout: now and then, an audio-visual view of an utterance is trained on one of its streams alone.

It acts on features, not on raw clips: a stream that is left out is all zeros before its projector, as AV-HuBERT does it
(Shi et al., 2022). So the other views of the utterance in the same step keep both streams and the encoders run once
for all; a projector turns zeros into a token of its own, which the LLM learns to read as "not there"; and the number
of tokens stays that of the clip.
"""

from __future__ import annotations

from dataclasses import dataclass

from mome_dist.data.seeding import utterance_rng


@dataclass(frozen=True)
class ModalityDropout:
    """Which stream of an audio-visual view is left out.

    Attributes:
        audio, video: probabilities that this stream is; never both, so that their sum is at most 1.
        seed: of the run.
    """

    audio: float
    video: float
    seed: int

    def left_out(self, utterance_id: str, view: str, draw: int) -> str | None:
        """ "audio", "video" or None, for an utterance in an audio-visual view (its name); a pure function."""
        if self.audio + self.video == 0:
            return None
        chance = utterance_rng(self.seed, f"modality dropout {view}", utterance_id, draw).random()
        if chance < self.audio:
            return "audio"
        return "video" if chance < self.audio + self.video else None
