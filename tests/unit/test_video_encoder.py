"""The video encoder: independence from neighbours, saving, freezing, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mome_dist.errors import UserError
from mome_dist.speech.clip_encoder import PointwiseConvolution, neighbourhoods
from mome_dist.speech.video_encoder import FrontEnd, VideoEncoder, VideoEncoderConfig

SMALL = VideoEncoderConfig(trunk_widths=(4, 8), width=16, heads=2, ffn_width=32, position_kernel=5, dropout=0.2)


def clips(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n, 96, 96), generator=generator, dtype=torch.uint8) for n in lengths]


@pytest.fixture
def encoder() -> VideoEncoder:
    torch.manual_seed(0)
    model = VideoEncoder(SMALL)
    model.train()
    model(clips(5, 6))  # BatchNorm statistics that are not the initial ones
    return model.eval()


def test_output_of_a_clip_does_not_depend_on_its_batch(encoder: VideoEncoder) -> None:
    batch = clips(7, 1, 30, 12)
    with torch.no_grad():
        together = encoder(batch)
        for clip, features in zip(batch, together, strict=True):
            assert features.shape == (len(clip), 16)
            torch.testing.assert_close(features, encoder([clip])[0], rtol=0, atol=1e-5)


def test_batchnorm_statistics_see_valid_frames_only() -> None:
    """Training on a long and a short clip leaves the stem's statistics of exactly the frames that exist."""
    encoder = VideoEncoder(SMALL).train()
    batch = clips(9, 2)
    encoder(batch)
    frames = [encoder._normalise(clip) for clip in batch]
    stem = torch.cat([encoder.front_end.stem(neighbourhoods([clip], 5)) for clip in frames])
    expected = 0.1 * stem.mean((0, 2, 3))  # momentum 0.1 from zero
    torch.testing.assert_close(encoder.front_end.stem_norm.running_mean, expected, rtol=1e-4, atol=1e-6)


def test_stem_is_a_3d_convolution() -> None:
    front_end = FrontEnd(SMALL)
    clip = torch.randn(6, 44, 44)
    as_2d = front_end.stem(neighbourhoods([clip], 5))
    as_3d = nn.functional.conv3d(clip[None, None], front_end.stem.weight[:, None], stride=(1, 2, 2), padding=(2, 2, 2))[
        0
    ].transpose(0, 1)
    torch.testing.assert_close(as_2d, as_3d, rtol=0, atol=1e-5)


def test_crop_is_the_centre_and_pixels_are_normalised(encoder: VideoEncoder) -> None:
    (clip,) = clips(3)
    bordered = torch.full_like(clip, 255)
    bordered[:, 4:92, 4:92] = clip[:, 4:92, 4:92]
    assert torch.equal(encoder([clip])[0], encoder([bordered])[0])
    grey = torch.full((1, 96, 96), 107, dtype=torch.uint8)
    torch.testing.assert_close(encoder._normalise(grey), torch.full((1, 44, 44), (107 / 255 - 0.421) / 0.165))


def test_saved_and_loaded_encoder_is_the_same_and_frozen(encoder: VideoEncoder, tmp_path: Path) -> None:
    encoder.feature_mean.fill_(0.5)
    encoder.feature_std.fill_(2.0)
    encoder.save_pretrained(tmp_path)
    loaded = VideoEncoder.from_pretrained(tmp_path).train()
    assert loaded.config == SMALL
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    statistics = loaded.front_end.stem_norm.running_mean
    assert statistics is not None
    before = statistics.clone()
    with torch.no_grad():
        for ours, theirs in zip(encoder(clips(4, 9)), loaded(clips(4, 9)), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(before, statistics)
    assert VideoEncoder.from_pretrained(tmp_path, frozen=False).train().training


def test_mistakes_are_named(encoder: VideoEncoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        VideoEncoder.from_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        VideoEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": "mome_dist.video_encoder/1", "encoder": {"width": 16}}))
    with pytest.raises(UserError, match="'encoder' must have exactly"):
        VideoEncoder.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="uint8"):
        encoder([torch.zeros(3, 96, 96)])
    with pytest.raises(UserError, match="multiple of heads"):
        VideoEncoderConfig(width=10, heads=4)


def test_strided_shortcuts_are_those_of_torch() -> None:
    """In another memory layout, where oneDNN's own does not write beyond its buffers."""
    torch.manual_seed(0)
    ours, x_NCHW = PointwiseConvolution(4, 8, stride=2), torch.randn(3, 4, 11, 11)
    theirs = torch.nn.Conv2d(4, 8, 1, 2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    inputs = [x_NCHW.contiguous(memory_format=torch.channels_last).requires_grad_(), x_NCHW.clone().requires_grad_()]
    for convolution, given in zip((ours, theirs), inputs, strict=True):
        convolution(given).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
