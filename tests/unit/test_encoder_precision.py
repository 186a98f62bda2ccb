"""Encoders in bf16: how far from fp32 on real speech, what stays fp32, what LoRA learns, whose features are whose."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor, nn

from mome_dist.assets import asset_dir
from mome_dist.config import load_config
from mome_dist.config.schema import RunConfig
from mome_dist.data.encoding import load_encoder
from mome_dist.data.features import encoder_fingerprint
from mome_dist.speech.avhubert import AVHubertConfig, AVHubertEncoder
from mome_dist.speech.clip_encoder import ClipEncoder
from mome_dist.speech.lora import attach_lora, lora_layers
from mome_dist.speech.video_encoder import VideoEncoder
from mome_dist.speech.whisper import WhisperAudioEncoder

SPEECH = Path(__file__).resolve().parents[1] / "data" / "librivox"
CPU = torch.device("cpu")
# Standard deviation of a rounding to bf16, relative: uniform within half the distance of neighbours, 2**-8, at most.
ROUNDING = 2.0**-8 / 3**0.5


def recorded(name: str) -> Tensor:
    samples, rate = soundfile.read(SPEECH / f"{name}.flac", dtype="float32")
    assert rate == 16_000
    return torch.from_numpy(samples)


def configured(precision: str, video: Path | None = None) -> RunConfig:
    config = RunConfig()
    config.audio_encoder.path, config.audio_encoder.padding = str(asset_dir("whisper-tiny.en")), "clip"
    config.video_encoder.path = str(video)
    config.audio_encoder.precision = config.video_encoder.precision = precision
    return config


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@torch.no_grad()
def test_bf16_features_of_real_speech_are_off_by_their_roundings() -> None:
    """Six products a layer round their weights and their results, and eight steps between them round once more (norms,
    scaled queries, probabilities, activation, sums). If every one of these roundings reached the features whole, they
    would be off by the square root of their number. Layers hand on less than that; far less would be another
    precision."""
    clips = [recorded("0880"), recorded("0930")]
    exact, found = (
        torch.cat(load_encoder(configured(precision), "audio", CPU)(clips)) for precision in ("fp32", "bf16")
    )
    assert (exact.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    layers, convolutions = 4, 2
    bound = ROUNDING * (20 * layers + 4 * convolutions + 2) ** 0.5
    error = relative(found, exact)
    cosine = torch.cosine_similarity(found.double(), exact.double())
    print(f"bf16 features are off by {error:.2e} of at most {bound:.2e}, cosine {cosine.mean():.6f}")
    assert 0.2 * bound < error < bound
    assert cosine.mean() > 1 - bound**2 / 2  # an error of that size, at a right angle


SMALL = AVHubertConfig(trunk_widths=(8, 16), width=64, layers=2, heads=4, ffn_width=96)


def lively(encoder: ClipEncoder) -> ClipEncoder:
    """With statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randint(0, 256, (9, 96, 96), generator=generator, dtype=torch.uint8) for _ in range(3)]
    encoder.train()(clips)
    if isinstance(encoder, VideoEncoder):
        encoder.feature_mean.normal_(0, 0.1)
        encoder.feature_std.uniform_(0.5, 2)
    return encoder.freeze()


@pytest.mark.parametrize("kind", ["video", "avhubert"])
def test_video_encoders_keep_statistics_in_fp32(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    exact = lively(VideoEncoder() if kind == "video" else AVHubertEncoder(SMALL))
    exact.save_pretrained(tmp_path)
    loaded = load_encoder(configured("bf16", tmp_path), "video", CPU)
    before = exact.state_dict()
    for name, module in loaded.named_modules():
        statistics = isinstance(module, nn.BatchNorm2d)
        for key, value in module.named_parameters(prefix=name, recurse=False):
            assert value.dtype == (torch.float32 if statistics else torch.bfloat16), key
            torch.testing.assert_close(value.float(), before[key], rtol=0 if statistics else 2**-8, atol=0)
        for key, value in module.named_buffers(prefix=name, recurse=False):
            assert torch.equal(value, before[key]), key
    clips = [torch.randint(0, 256, (n, 96, 96), dtype=torch.uint8) for n in (7, 12)]
    with torch.no_grad():
        expected, found = exact(clips), loaded(clips)
    assert 1e-3 < relative(torch.cat(found), torch.cat(expected)) < 3e-2
    assert not any(module.training for module in loaded.modules())


def test_lora_of_a_bf16_encoder_trains_in_fp32() -> None:
    """Terms and their gradients are fp32; the gradients are those of the fp32 encoder to what bf16 makes of them.

    With random wishes for every frame they are sums whose parts nearly cancel, so bf16 is seen larger than it is in
    training: most in the first layer, whose gradients came through three others. It is the frozen layers' bf16: with
    terms that are multiplied in fp32 the cosines are 0.970 and 0.998 where they are 0.958 and 0.997 here.
    """
    gradients: dict[str, dict[str, Tensor]] = {}
    clip = recorded("0880")
    wanted = torch.randn(149, 384, generator=torch.Generator().manual_seed(2))
    for precision in ("fp32", "bf16"):
        encoder = load_encoder(configured(precision), "audio", CPU)
        attach_lora(encoder, 4, 8)
        for layer in lora_layers(encoder).values():
            assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
            with torch.no_grad():
                layer.lora_b.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
        (features,) = encoder([clip])
        assert features.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        (features.float() * wanted).sum().backward()
        named = {name: value for name, value in encoder.named_parameters() if value.requires_grad}
        gradients[precision] = {name: value.grad for name, value in named.items() if value.grad is not None}
        assert gradients[precision].keys() == named.keys() and len(named) == 4 * 2 * 2
    for name, exact in gradients["fp32"].items():
        found = gradients["bf16"][name]
        assert found.dtype == torch.float32
        least = 0.99 if ".layers.3." in name else 0.94
        assert torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > least, name


def test_a_small_update_of_lora_is_not_lost_in_bf16() -> None:
    """A millionth is far below what a bf16 weight of 0.05 can take up; the fp32 term does, and steps add up."""
    encoder = load_encoder(configured("bf16"), "audio", CPU)
    attach_lora(encoder, 4, 8)
    layer = next(iter(lora_layers(encoder).values()))
    with torch.no_grad():
        layer.lora_b.fill_(0.05)
        for _ in range(1000):
            layer.lora_b.add_(1e-6)
    torch.testing.assert_close(layer.lora_b, torch.full_like(layer.lora_b, 0.051), rtol=1e-4, atol=0)


def test_features_of_one_precision_are_never_those_of_another() -> None:
    names = {
        precision: encoder_fingerprint(encoder := load_encoder(configured(precision), "audio", CPU), encoder.settings)
        for precision in ("fp32", "bf16")
    }
    # As stores have it that were made before there was a choice of precision.
    assert names["fp32"] == "9bd132d3484e5e06" != names["bf16"]


@pytest.mark.parametrize("stream", ["audio", "video"])
def test_auto_is_what_the_device_multiplies(monkeypatch: pytest.MonkeyPatch, stream: str, tmp_path: Path) -> None:
    VideoEncoder().save_pretrained(tmp_path)
    assert getattr(load_config([]), f"{stream}_encoder").precision == "auto"
    for capabilities, expected in (({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        encoder = load_encoder(configured("auto", tmp_path), stream, CPU)
        linear = next(module for module in encoder.modules() if isinstance(module, nn.Linear))
        assert linear.weight.dtype == expected


def test_precision_is_set_once_and_for_all_parts() -> None:
    whisper = WhisperAudioEncoder.from_pretrained(asset_dir("whisper-tiny.en"), "clip")
    cast, loaded = copy.deepcopy(whisper).set_precision(torch.bfloat16), whisper.state_dict()
    assert all(torch.equal(value, loaded[name].bfloat16()) for name, value in cast.state_dict().items())
