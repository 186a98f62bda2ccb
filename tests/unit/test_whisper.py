"""The Whisper encoder: frame counts, padding, independence from neighbours, frozen for good."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel

from mome_dist.errors import UserError
from mome_dist.speech.matryoshka import audio_frames
from mome_dist.speech.whisper import Padding, WhisperAudioEncoder
from tests.whisper_directory import whisper_directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper_directory(tmp_path_factory.mktemp("whisper"))


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


SIZES = {  # width, heads, mel bins, vocabulary of the published models; a large decoder takes seconds to write
    "tiny.en": (384, 6, 80, 51_864),
    "tiny": (384, 6, 80, 51_865),
    "base": (512, 8, 80, 64),
    "small": (768, 12, 80, 64),
    "medium.en": (1024, 16, 80, 64),
    "large-v2": (1280, 20, 80, 64),
    "large-v3": (1280, 20, 128, 64),
}


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_whisper_itself(size: str, tmp_path: Path) -> None:
    """One layer of each published shape, saved in half precision as the large ones are, in a directory of any name."""
    width, heads, mel_bins, vocabulary = SIZES[size]
    whisper_directory(tmp_path, width, 1, heads, mel_bins, vocab_size=vocabulary, max_target_positions=4)
    full = WhisperForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    full.save_pretrained(tmp_path, max_shard_size="2MB")  # model.encoder.*, cut into files; the decoder among them
    (tmp_path / "model.safetensors").unlink()
    clip = speech(20_000)
    encoder = WhisperAudioEncoder.from_pretrained(tmp_path)
    (features,) = encoder([clip])
    assert features.shape == (62, width) == (62, encoder.width) and features.dtype == torch.float32
    mel = WhisperFeatureExtractor(feature_size=mel_bins)(clip.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = full.float().eval().get_encoder()(mel.input_features)[0]
    torch.testing.assert_close(features, expected[0, :62], rtol=0, atol=1e-5)


def test_the_decoder_is_not_read(directory: Path, tmp_path: Path) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    encoder_alone = {name: value for name, value in weights.items() if name.startswith("encoder.")}
    save_file(encoder_alone, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (ours,), (theirs,) = (WhisperAudioEncoder.from_pretrained(path)([speech(9_000)]) for path in (tmp_path, directory))
    assert torch.equal(ours, theirs)


def test_mel_bins_that_do_not_fit_are_named(directory: Path, tmp_path: Path) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"128 mel bins, config\.json asks for 80"):
        WhisperAudioEncoder.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_mel_bins": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"encoder\.conv1\.weight has shape \[32, 80, 3\]"):
        WhisperAudioEncoder.from_pretrained(tmp_path)


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
