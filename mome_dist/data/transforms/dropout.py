"""Modality dropout: now and then, an audio-visual view of an utterance is trained on one of its streams alone.

It acts on features, not on raw clips: a stream that is left out is all zeros before its projector, as AV-HuBERT does it
(Shi et al., 2022). So the other views of the utterance in the same step keep both streams and the encoders run once
for all; a projector turns zeros into a token of its own, which the LLM learns to read as "not there"; and the number
of tokens stays that of the clip.

The probabilities may move over the first steps of a run, in a line or along half a cosine, which is this project's own:
AV-HuBERT and Auto-AVSR keep them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mome_dist.data.seeding import utterance_rng

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class ModalityDropout:
    """Which stream of an audio-visual view is left out.

    Attributes:
        audio, video: probabilities that this stream is, at first; never both, so that their sum is at most 1.
        seed: of the run.
        schedule: how the probabilities move, one of `SCHEDULES`.
        audio_to, video_to: where they end; of no effect with a constant schedule.
        steps: that this takes, at least one; then they stay.
    """

    audio: float
    video: float
    seed: int
    schedule: str = "constant"
    audio_to: float = 0.0
    video_to: float = 0.0
    steps: float = 1.0

    def at(self, step: int) -> tuple[float, float]:
        """The probabilities of audio and video in a step, counted from zero."""
        done = min(1.0, step / self.steps)
        way = {"constant": 0.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}[self.schedule]
        return self.audio + way * (self.audio_to - self.audio), self.video + way * (self.video_to - self.video)

    def left_out(self, utterance_id: str, view: str, draw: int, step: int = 0) -> str | None:
        """ "audio", "video" or None, for an utterance in an audio-visual view (its name); a pure function."""
        audio, video = self.at(step)
        if audio + video == 0:
            return None
        chance = utterance_rng(self.seed, f"modality dropout {view}", utterance_id, draw).random()
        if chance < audio:
            return "audio"
        return "video" if chance < audio + video else None
