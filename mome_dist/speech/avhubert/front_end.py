"""The video front end of AV-HuBERT: a 3-D convolution over neighbouring frames, then a ResNet-18 on each frame.

88 x 88 pixels become 64 channels of 44 x 44 (stem), 22 x 22 (pooling), and 512 of 3 x 3 after the ResNet, which are
averaged. Activations are PReLU, with one slope a channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mome_dist.speech.avhubert.config import AVHubertConfig
from mome_dist.speech.clip_encoder import PointwiseConvolution, neighbourhoods

# Frames that are encoded at once in eval mode: a stem of 64 channels takes half a megabyte a frame.
FRAMES_AT_ONCE = 512


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.activation1 = nn.PReLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.activation2 = nn.PReLU(out_channels)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            convolution = PointwiseConvolution(in_channels, out_channels, stride)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map [frames, in, H, W] to [frames, out, H / stride, W / stride]."""
        shortcut = x_NCHW if self.shortcut is None else self.shortcut(x_NCHW)
        hidden = self.activation1(self.norm1(self.conv1(x_NCHW)))
        return self.activation2(self.norm2(self.conv2(hidden)) + shortcut)


class FrontEnd(nn.Module):
    """One vector of ``config.width`` a frame."""

    def __init__(self, config: AVHubertConfig) -> None:
        super().__init__()
        self.stem_frames = config.stem_frames
        first = config.trunk_widths[0]
        # The 3-D convolution and its BatchNorm on frames laid side by side, see `neighbourhoods`.
        self.stem = nn.Conv2d(
            config.stem_frames, first, config.stem_kernel, stride=2, padding=config.stem_kernel // 2, bias=False
        )
        self.stem_norm = nn.BatchNorm2d(first)
        self.stem_activation = nn.PReLU(first)
        self.stages = nn.ModuleList()
        channels = first
        for number, width in enumerate(config.trunk_widths):
            strides = [1 if number == 0 else 2] + [1] * (config.trunk_blocks - 1)
            widths = [channels] + [width] * (config.trunk_blocks - 1)
            self.stages.append(
                nn.Sequential(*(ResidualBlock(i, width, stride) for i, stride in zip(widths, strides, strict=True)))
            )
            channels = width
        self.projection = nn.Linear(channels, config.width)

    def forward(self, clips: Sequence[Tensor]) -> Tensor:
        """Map normalised clips [T_i, H, W] to [sum T_i, width], in order."""
        x_NCHW = neighbourhoods(clips, self.stem_frames)
        # A BatchNorm that trains has to see all frames at once; one at rest does not.
        parts = [x_NCHW] if self.training else x_NCHW.split(FRAMES_AT_ONCE)
        return torch.cat([self._frames(part) for part in parts])

    def _frames(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        hidden = self.stem_activation(self.stem_norm(self.stem(x_NCHW)))
        hidden = F.max_pool2d(hidden, 3, stride=2, padding=1)
        for stage in self.stages:
            hidden = stage(hidden)
        return self.projection(hidden.mean((2, 3)))
