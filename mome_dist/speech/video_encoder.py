"""A small visual-speech encoder with AV-HuBERT's shape.

AV-HuBERT (Shi et al., 2022; `mome_dist.speech.avhubert`) reads mouth crops with a 3-D convolution over a few
neighbouring frames, a 2-D ResNet on each frame, then a Transformer. This encoder keeps that order at a size that two
CPU cores can train in minutes.

Output features are standardised by statistics stored with the weights, so that each dimension has about zero mean and
unit variance over the training corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mome_dist.errors import UserError
from mome_dist.speech.clip_encoder import ClipEncoder, PointwiseConvolution, neighbourhoods


@dataclass(frozen=True)
class VideoEncoderConfig:
    """Shape of a `VideoEncoder`.

    Attributes:
        crop: side in pixels of the square cut from each frame (its centre, in ``forward``).
        downsample: the crop is averaged over ``downsample`` x ``downsample`` pixels first; 2 is four times cheaper.
        pixel_mean, pixel_std: statistics of grey values in [0, 1] (AV-HuBERT's).
        stem_frames: neighbouring frames that the 3-D stem sees; odd.
        trunk_widths: channels after the stem and after each residual block, each of which halves the picture.
        width: size of the Transformer and of the output features.
        layers, heads, ffn_width: the Transformer.
        position_kernel, position_groups: the convolutional positional embedding.
        dropout: in the Transformer, while training.
    """

    crop: int = 88
    downsample: int = 2
    pixel_mean: float = 0.421
    pixel_std: float = 0.165
    stem_frames: int = 5
    trunk_widths: tuple[int, ...] = (16, 32, 64, 128)
    width: int = 128
    layers: int = 2
    heads: int = 4
    ffn_width: int = 512
    position_kernel: int = 15
    position_groups: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check that the sizes fit each other; raises UserError."""
        object.__setattr__(self, "trunk_widths", tuple(self.trunk_widths))
        if self.stem_frames % 2 == 0 or self.position_kernel % 2 == 0:
            raise UserError("Video encoder: stem_frames and position_kernel must be odd, to have a middle frame.")
        if self.width % self.heads or self.width % self.position_groups:
            raise UserError(f"Video encoder: width={self.width} must be a multiple of heads and of position_groups.")
        if self.crop % self.downsample:
            raise UserError(f"Video encoder: crop={self.crop} must be a multiple of downsample={self.downsample}.")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, the first of stride 2, around a 1x1 shortcut (ResNet-18's block)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = PointwiseConvolution(in_channels, out_channels, stride=2)
        self.shortcut_norm = nn.BatchNorm2d(out_channels)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map [frames, in, H, W] to [frames, out, H/2, W/2]."""
        hidden = F.relu(self.norm1(self.conv1(x_NCHW)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut_norm(self.shortcut(x_NCHW)))


class FrontEnd(nn.Module):
    """3-D convolutional stem and 2-D residual trunk: one vector a frame."""

    def __init__(self, config: VideoEncoderConfig) -> None:
        super().__init__()
        self.stem_frames = config.stem_frames
        first, *rest = config.trunk_widths
        self.stem = nn.Conv2d(config.stem_frames, first, 5, stride=2, padding=2, bias=False)
        self.stem_norm = nn.BatchNorm2d(first)
        widths = [first, *rest]
        self.blocks = nn.Sequential(*(ResidualBlock(i, o) for i, o in zip(widths, rest, strict=False)))
        self.projection = nn.Linear(widths[-1], config.width)

    def forward(self, clips: Sequence[Tensor]) -> Tensor:
        """Map clips [T_i, H, W] to [sum T_i, width], in order."""
        x_NCHW = neighbourhoods(clips, self.stem_frames).contiguous(memory_format=torch.channels_last)
        hidden = F.relu(self.stem_norm(self.stem(x_NCHW)))
        return self.projection(self.blocks(hidden).mean((2, 3)))


class VideoEncoder(ClipEncoder):
    """Mouth crops to features, 25 a second."""

    format = "mome_dist.video_encoder/1"
    shape = VideoEncoderConfig
    front_end_class = FrontEnd
    config: VideoEncoderConfig
    front_end: FrontEnd
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: VideoEncoderConfig | None = None) -> None:
        super().__init__(config)
        self.register_buffer("feature_mean", torch.zeros(self.width))
        self.register_buffer("feature_std", torch.ones(self.width))

    def forward(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Encode clips, as `ClipEncoder.forward`, and standardise the features."""
        return [(clip_TD - self.feature_mean) / self.feature_std for clip_TD in super().forward(clips)]

    def shrink(self, pixels_THW: Tensor) -> Tensor:
        """Average over ``downsample`` x ``downsample`` pixels."""
        if self.config.downsample == 1:
            return pixels_THW
        return F.avg_pool2d(pixels_THW[:, None], self.config.downsample)[:, 0]
