"""Log-mel spectrograms of many clips at once against transformers' own, clip by clip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from mome_dist.speech.log_mel import LogMel


def sound(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


def theirs(extractor: WhisperFeatureExtractor, clip: Tensor, seconds: int) -> Tensor:
    found = extractor(
        [clip.numpy()],
        sampling_rate=16_000,
        padding="max_length",
        max_length=seconds * 16_000,
        return_tensors="pt",
    )
    return found.input_features[0]


@pytest.mark.parametrize(
    ("lengths", "seconds"),
    [
        ([1], 1),
        ([50_000, 70_000, 100], 30),
        # Sound up to the end, and so near to it that the reflection hears it.
        ([15_999, 15_801, 15_799], 1),
        ([480_000, 479_900, 3_000], 30),
        # What is heard ends just before, at and after a whole second.
        ([79_799, 79_800], 30),
        ([79_801], 30),
        ([80_000, 16_000], 5),
    ],
)
@pytest.mark.parametrize("mel_bins", [80, 128])
def test_a_batch_is_what_transformers_makes_of_each_clip(lengths: list[int], seconds: int, mel_bins: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    clips = sound(*lengths)
    found = LogMel(extractor)(clips, seconds)
    expected = torch.stack([theirs(extractor, clip, seconds) for clip in clips])
    assert found.shape == expected.shape == (len(clips), mel_bins, 100 * seconds)
    # Values are (log10 + 4) / 4 of fp32 sums of 201 powers: 201 roundings of 2^-24 move a logarithm by 5e-6 at most.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_silence_and_faint_sound_keep_whispers_floor() -> None:
    """Silence is -10; after a loud clip, 8 below the loudest value."""
    log_mel = LogMel(WhisperFeatureExtractor(feature_size=80))
    silent, loud = log_mel([torch.zeros(16_000), sound(16_000)[0]], 30)
    assert silent.unique().tolist() == [(-10 + 4) / 4]
    assert loud[:, 200:].unique().numel() == 1 and loud.min() == pytest.approx(loud.max() - 2)


def test_only_what_can_be_heard_is_transformed(monkeypatch: pytest.MonkeyPatch) -> None:
    transformed, stft = list[torch.Size](), torch.stft

    def noted(sound_BS: Tensor, *rest: Any, **more: Any) -> Tensor:
        transformed.append(sound_BS.shape)
        return stft(sound_BS, *rest, **more)

    monkeypatch.setattr(torch, "stft", noted)
    LogMel(WhisperFeatureExtractor(feature_size=80))(sound(50_000, 20_000), 30)
    assert transformed == [(2, 4 * 16_000)]
