"""Checks of what is done to clips in training."""

from __future__ import annotations

import math

from mome_dist.config.schema import RunConfig
from mome_dist.errors import UserError


def check_augmentation(config: RunConfig) -> None:
    """Check probabilities, ratios and schedules, and that there are clips to change.

    Raises:
        UserError: naming the keys.
    """
    augmentation = config.augmentation
    dropout = augmentation.modality_dropout
    for key, probability in {
        "flip": augmentation.flip,
        "noise.probability": augmentation.noise.probability,
        "modality_dropout.audio": dropout.audio,
        "modality_dropout.video": dropout.video,
        "modality_dropout.audio_to": dropout.audio_to,
        "modality_dropout.video_to": dropout.video_to,
    }.items():
        if probability is not None and not 0 <= probability <= 1:
            raise UserError(f"augmentation.{key}={probability}: a probability is from 0 to 1.")
    for suffix, (audio, video) in {"": (dropout.audio, dropout.video), "_to": dropout.ends}.items():
        if audio + video > 1:
            raise UserError(
                f"augmentation.modality_dropout: audio{suffix}={audio} and video{suffix}={video} add up to more than "
                "1, but a view never loses both streams: lower one."
            )
    given = dropout.audio_to is not None or dropout.video_to is not None
    if given != (dropout.schedule != "constant"):
        raise UserError(
            f"augmentation.modality_dropout.schedule={dropout.schedule} with audio_to={dropout.audio_to} and video_to="
            f"{dropout.video_to}: a linear or cosine schedule ends at one of them at least, a constant one at none."
        )
    if not 0 < dropout.over <= 1:
        raise UserError(
            f"augmentation.modality_dropout.over={dropout.over}: a share of training.steps is above 0 and at most 1."
        )
    if augmentation.noise.source is not None and not augmentation.noise.snr:
        raise UserError("augmentation.noise.snr is empty: give ratios in dB, or set augmentation.noise.source=null.")
    if not all(snr is None or math.isfinite(snr) for snr in augmentation.noise.snr):
        raise UserError(f"augmentation.noise.snr={augmentation.noise.snr}: ratios are finite; null is clean.")
    if augmentation.active and config.data.features != "online":
        raise UserError(
            f"data.features={config.data.features} reads features that were made once from clean clips, which no "
            "augmentation can change: set data.features=online, or augmentation=none."
        )
