"""Faults of public code of this family that an encoder could have: each check fails where one is planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mome_dist.speech import clip_encoder, lora, whisper
from mome_dist.speech.avhubert import AVHubertConfig, AVHubertEncoder, conversion
from mome_dist.speech.clip_encoder import ClipEncoder
from mome_dist.speech.video_encoders import load_video_encoder
from mome_dist.speech.whisper import WhisperAudioEncoder
from tests.avhubert_checkpoint import small
from tests.whisper_directory import whisper_directory

Plant = Callable[[], None]
SHAPE = AVHubertConfig(trunk_widths=(4, 8), width=32, layers=2, heads=4, ffn_width=64, dropout=0.3)


def passes_and_fails_planted(check: Callable[[], None], plant: Plant) -> None:
    """The check finds nothing on the real code, and finds the planted fault."""
    check()
    plant()
    with pytest.raises(AssertionError):
        check()


def videos(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n, 96, 96), generator=generator, dtype=torch.uint8) for n in lengths]


def waves(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(n, generator=generator) for n in lengths]


def avhubert() -> AVHubertEncoder:
    torch.manual_seed(0)
    return AVHubertEncoder(SHAPE).freeze()


@pytest.fixture(scope="module")
def whisper_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper_directory(tmp_path_factory.mktemp("whisper"))


def independent_of_neighbours(encoder: nn.Module, clips: list[Tensor]) -> None:
    with torch.no_grad():
        for clip, features in zip(clips, encoder(clips), strict=True):
            alone = encoder([clip])[0]
            assert alone.shape == features.shape
            assert (alone - features).abs().max() <= 1e-5


def test_fault_02_padded_frames_are_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def plant() -> None:
        def blind(lengths: list[int], device: torch.device) -> Tensor:
            return torch.ones(len(lengths), max(lengths), dtype=torch.bool, device=device)

        monkeypatch.setattr(clip_encoder, "length_mask", blind)

    passes_and_fails_planted(lambda: independent_of_neighbours(avhubert(), videos(3, 20, 9)), plant)


def test_fault_02_a_stem_looks_into_the_next_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def plant() -> None:
        real = clip_encoder.neighbourhoods
        monkeypatch.setattr(
            "mome_dist.speech.avhubert.front_end.neighbourhoods",
            lambda clips, size: real([torch.cat(list(clips))], size),
        )

    passes_and_fails_planted(lambda: independent_of_neighbours(avhubert(), videos(3, 20, 9)), plant)


def test_fault_02_padded_audio_is_kept(whisper_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, clips = WhisperAudioEncoder.from_pretrained(whisper_path, padding="clip"), waves(9_000, 30_000, 41_000)

    def check() -> None:
        assert [len(each) for each in encoder(clips)] == [28, 93, 128]  # 50 a second
        independent_of_neighbours(encoder, clips)

    passes_and_fails_planted(check, lambda: monkeypatch.setattr(whisper, "audio_frames", lambda samples: 1500))


def at_rest(encoder: nn.Module, clips: list[Tensor]) -> None:
    """Twice the same, no module in train mode and no buffer moved, though the model around it trains."""
    whole = nn.ModuleDict({"encoder": encoder})
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    whole.train()
    with torch.no_grad():
        first, second = encoder(clips), encoder(clips)
    assert not any(module.training for module in encoder.modules())
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_fault_03_a_frozen_video_encoder_trains_along(monkeypatch: pytest.MonkeyPatch) -> None:
    passes_and_fails_planted(
        lambda: at_rest(avhubert(), videos(4, 6)),
        lambda: monkeypatch.setattr(ClipEncoder, "train", nn.Module.train),
    )


def test_fault_03_each_part_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm statistics move and dropout differs where the fault is planted: no flag alone is checked."""
    monkeypatch.setattr(ClipEncoder, "train", nn.Module.train)
    encoder = avhubert().train()
    statistics = encoder.front_end.video.stem_norm.running_mean
    assert statistics is not None
    before = statistics.clone()
    first, second = encoder(videos(4)), encoder(videos(4))
    assert not torch.equal(first[0], second[0]) and not torch.equal(before, statistics)


def test_fault_03_a_frozen_whisper_trains_along(whisper_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = WhisperAudioEncoder.from_pretrained(whisper_path, padding="clip")
    passes_and_fails_planted(
        lambda: at_rest(encoder, waves(9_000)),
        lambda: monkeypatch.setattr(WhisperAudioEncoder, "train", nn.Module.train),
    )


def test_fault_03_adapting_wakes_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        encoder = avhubert()
        lora.attach_lora(encoder, 2, 2)
        at_rest(encoder, videos(4, 6))
        assert all("lora_" in name for name in encoder.trainable_parameters())

    def plant() -> None:
        real = lora.attach_lora

        def thawed(model: ClipEncoder, rank: int, alpha: float) -> list[str]:
            names = real(model, rank, alpha)
            model.frozen = False
            model.requires_grad_(True)
            return names

        monkeypatch.setattr(lora, "attach_lora", thawed)

    passes_and_fails_planted(check, plant)


def test_fault_11_the_shape_comes_from_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is called "large" holds what its configuration says."""
    avhubert().save_pretrained(tmp_path / "avhubert-large")

    def check() -> None:
        encoder = load_video_encoder(tmp_path / "avhubert-large")
        assert encoder.config == SHAPE and encoder.width == 32

    def plant() -> None:
        real = clip_encoder.read_document

        def by_name(directory: Path) -> dict[str, object]:
            document = real(directory)
            if "large" in directory.name:
                document["encoder"] = json.loads(json.dumps(document["encoder"])) | {"dropout": 0.0}
            return document

        monkeypatch.setattr(clip_encoder, "read_document", by_name)

    passes_and_fails_planted(check, plant)


def test_fault_11_the_converter_knows_two_sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    published = small()

    def check() -> None:
        told = {"encoder_attention_heads": published.heads, "layer_norm_first": True}
        found, _ = conversion.shape_of(published.state_dict(), told, {})
        assert (found.width, found.layers, found.heads, found.ffn_width) == (32, 2, 4, 64)
        assert found.trunk_widths == (4, 8, 8, 16)

    plant = lambda: monkeypatch.setattr(conversion, "shape_of", lambda *_: (AVHubertConfig(), {}))  # noqa: E731
    passes_and_fails_planted(check, plant)


def test_fault_11_whisper_is_of_one_width(whisper_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whisper_directory(tmp_path, width=48, heads=3, mel_bins=128)

    def check() -> None:
        for path, width in ((whisper_path, 32), (tmp_path, 48)):
            encoder = WhisperAudioEncoder.from_pretrained(path, padding="clip")
            assert encoder.width == width == encoder(waves(8_000))[0].shape[1]

    def plant() -> None:
        real = WhisperAudioEncoder.__init__

        def fixed(self: WhisperAudioEncoder, *arguments: object) -> None:
            real(self, *arguments)  # type: ignore[arg-type]
            self.width = 1024

        monkeypatch.setattr(WhisperAudioEncoder, "__init__", fixed)

    passes_and_fails_planted(check, plant)


def test_fault_11_an_adapter_stores_the_frozen_model(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = avhubert()
    lora.attach_lora(encoder, 2, 2)

    def check() -> None:
        stored = lora.LoRATerms({"video": encoder}).state_dict()
        assert stored.keys() == {f"video.{name}" for name in encoder.trainable_parameters()}

    passes_and_fails_planted(check, lambda: monkeypatch.setattr(lora, "LoRATerms", nn.ModuleDict))
