"""The Whisper encoder: frame counts, padding, independence from neighbours, frozen for good."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from mome_dist.errors import UserError
from mome_dist.speech.matryoshka import audio_frames
from mome_dist.speech.whisper import Padding, WhisperAudioEncoder


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper with random weights and dropout, as a plain Hugging Face directory."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=64,
        dropout=0.3,
        encoder_layerdrop=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    path = tmp_path_factory.mktemp("whisper")
    WhisperModel(config).save_pretrained(path)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(path)
    return path


def speech(samples: int, seed: int = 0) -> torch.Tensor:
    noise = np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)
    return torch.from_numpy(noise * np.hanning(samples).astype(np.float32))


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(1, 25), (8_000, 25), (8_319, 25), (8_320, 26), (16_000, 50), (40_123, 125), (480_000, 1500)],
)
def test_frames_are_fifty_a_second_and_at_least_25(directory: Path, samples: int, frames: int) -> None:
    assert audio_frames(samples) == frames
    encoder = WhisperAudioEncoder.from_pretrained(directory, padding="clip")
    (features,) = encoder([speech(samples)])
    assert features.shape == (frames, encoder.width) == (frames, 32)


def test_30s_padding_is_whisper_itself(directory: Path) -> None:
    clip = speech(50_000)
    mel = WhisperFeatureExtractor(feature_size=80)(clip.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = WhisperModel.from_pretrained(directory).eval().get_encoder()(mel.input_features)[0]
    (features,) = WhisperAudioEncoder.from_pretrained(directory, padding="30s")([clip])
    torch.testing.assert_close(features, expected[0, :156], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", ["30s", "clip"])
def test_features_do_not_depend_on_neighbours(directory: Path, padding: Padding) -> None:
    encoder = WhisperAudioEncoder.from_pretrained(directory, padding=padding)
    clips = [speech(n, seed) for seed, n in enumerate([20_000, 70_000, 31_000, 9_000, 16_000])]
    together = encoder(clips)
    for clip, features in zip(clips, together, strict=True):
        torch.testing.assert_close(features, encoder([clip])[0], rtol=0, atol=1e-5)


def test_clip_padding_depends_on_whole_seconds_only(directory: Path) -> None:
    encoder = WhisperAudioEncoder.from_pretrained(directory, padding="clip")
    clip = speech(20_000)
    (features,) = encoder([clip])
    (padded,) = encoder([torch.cat([clip, torch.zeros(12_000)])])  # also two seconds
    torch.testing.assert_close(features, padded[: len(features)], rtol=0, atol=1e-5)


def test_stays_in_eval_mode_without_gradients(directory: Path) -> None:
    encoder = WhisperAudioEncoder.from_pretrained(directory, padding="clip").train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    first, second = encoder([speech(30_000)])[0], encoder([speech(30_000)])[0]
    assert torch.equal(first, second)  # dropout and layer drop of the config would differ


def test_normalize_removes_loudness(directory: Path) -> None:
    encoder = WhisperAudioEncoder.from_pretrained(directory, padding="clip", normalize=True)
    clip = speech(30_000)
    torch.testing.assert_close(encoder([clip])[0], encoder([0.2 * clip + 0.1])[0], rtol=0, atol=1e-3)
    plain = WhisperAudioEncoder.from_pretrained(directory, padding="clip")
    assert (plain([clip])[0] - plain([0.2 * clip + 0.1])[0]).abs().max() > 1e-2


def test_mistakes_are_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        WhisperAudioEncoder.from_pretrained(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    with pytest.raises(UserError, match="holds no weights"):
        WhisperAudioEncoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(UserError, match="cannot be read"):
        WhisperAudioEncoder.from_pretrained(tmp_path)
    weights = load_file(directory / "model.safetensors")
    del weights["encoder.layers.1.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack encoder\.layers\.1\.fc1\.weight"):
        WhisperAudioEncoder.from_pretrained(tmp_path)
    other = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="llama"):
        WhisperAudioEncoder.from_pretrained(tmp_path)
    encoder = WhisperAudioEncoder.from_pretrained(directory, padding="clip")
    with pytest.raises(UserError, match=r"31\.0 s"):
        encoder([torch.zeros(31 * 16_000)])
    with pytest.raises(UserError, match="non-empty"):
        encoder([torch.zeros(2, 16_000)])
