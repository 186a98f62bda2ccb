"""What training does to an utterance before the encoders see it, from the configuration: see ``configs/augmentation``.

Audio: a time mask on the clean speech, then noise at a drawn ratio, so that masked spans hold noise alone. Video: crop,
flip, time mask. Everything is a pure function of (seed, utterance id, draw).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mome_dist.config.schema import AugmentationConfig
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import Audio, Video
from mome_dist.data.noise import NoiseSource, add, open_noise
from mome_dist.data.seeding import utterance_rng
from mome_dist.data.transforms.crop import random_crop
from mome_dist.data.transforms.flip import random_flip
from mome_dist.data.transforms.time_mask import TimeMask


@dataclass(frozen=True)
class Augmentation:
    """Augments the clips of a split.

    Attributes:
        config: of the run.
        noise: of the configuration's source; None adds none.
        seed: of the run.
    """

    config: AugmentationConfig
    noise: NoiseSource | None
    seed: int

    @classmethod
    def open(cls, config: AugmentationConfig, corpus: Corpus, split: str, seed: int) -> Augmentation:
        """Open the noise source that a configuration names; babble comes from ``split``.

        Raises:
            UserError: see `open_noise`.
        """
        source = config.noise.source
        noise = None if source is None else open_noise(source, corpus, split, config.noise.talkers, seed)
        return cls(config, noise, seed)

    def snr(self, utterance: Utterance, draw: int) -> float | None:
        """The ratio that the utterance is heard at, in dB; None if clean."""
        settings, rng = self.config.noise, utterance_rng(self.seed, "snr", utterance.id, draw)
        if self.noise is None or rng.random() >= settings.probability:
            return None
        return settings.snr[rng.integers(len(settings.snr))]

    def audio(self, audio: Audio, utterance: Utterance, draw: int) -> tuple[Audio, Mapping[str, Any] | None]:
        """The speech that is trained on, float32 [samples], and what `mome_dist.data.noise.add` says of its noise."""
        mask = TimeMask(self.config.audio_time_mask.width, self.config.audio_time_mask.stride)
        masked = mask.audio(audio, utterance_rng(self.seed, "audio time mask", utterance.id, draw))
        if self.noise is None:
            return masked, None
        return add(self.noise, masked, utterance, self.snr(utterance, draw), draw)

    def video(self, video_THW: Video, utterance: Utterance, draw: int) -> Video:
        """The mouth that is trained on, uint8 [T, H, W]: cropped, or of the stored size where ``crop`` is null."""
        rng = utterance_rng(self.seed, "video", utterance.id, draw)
        if self.config.crop is not None:
            video_THW = random_crop(video_THW, self.config.crop, rng)
        video_THW = random_flip(video_THW, self.config.flip, rng)
        mask = TimeMask(self.config.video_time_mask.width, self.config.video_time_mask.stride)
        return mask.video(video_THW, utterance_rng(self.seed, "video time mask", utterance.id, draw))
