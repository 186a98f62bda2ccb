"""A small visual-speech encoder with AV-HuBERT's shape.

AV-HuBERT (Shi et al., 2022) reads 25 grey mouth crops a second: a 3-D convolution over a few neighbouring frames, a
2-D ResNet on each frame, then a Transformer with a convolutional positional embedding and pre-layer-norm blocks. This
encoder keeps that order at a size that two CPU cores can train in minutes. The Transformer is the one of
`transformers`' Hubert ("stable layer norm").

Padding is never content. The convolutional front end runs on the frames of all clips laid end to end, with zero frames
between clips and only valid frames kept, so that not even a BatchNorm statistic sees padding; the Transformer masks
attention to each clip's length. A clip's output is the same alone and in any batch.

Output features are standardised by statistics stored with the weights, so that each dimension has about zero mean and
unit variance over the training corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import HubertEncoderStableLayerNorm

from mome_dist.errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = "mome_dist.video_encoder/1"


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
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
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
        # With one input channel a 3-D convolution is a 2-D one whose channels are the neighbouring frames: the same
        # sum, and far faster on a CPU.
        self.stem = nn.Conv2d(config.stem_frames, first, 5, stride=2, padding=2, bias=False)
        self.stem_norm = nn.BatchNorm2d(first)
        widths = [first, *rest]
        self.blocks = nn.Sequential(*(ResidualBlock(i, o) for i, o in zip(widths, rest, strict=False)))
        self.projection = nn.Linear(widths[-1], config.width)

    def forward(self, clips: Sequence[Tensor]) -> Tensor:
        """Map clips [T_i, H, W] to [sum T_i, width], in order."""
        x_NCHW = self._neighbourhoods(clips).contiguous(memory_format=torch.channels_last)
        hidden = F.relu(self.stem_norm(self.stem(x_NCHW)))
        return self.projection(self.blocks(hidden).mean((2, 3)))

    def _neighbourhoods(self, clips: Sequence[Tensor]) -> Tensor:
        """Stack each valid frame with its neighbours: [sum T_i, stem_frames, H, W], zeros beyond a clip's ends."""
        margin = self.stem_frames // 2
        frames = torch.cat([F.pad(clip, (0, 0, 0, 0, margin, margin)) for clip in clips])
        starts, offset = [], 0
        for clip in clips:
            starts.append(torch.arange(offset, offset + len(clip)))
            offset += len(clip) + 2 * margin
        first = torch.cat(starts).to(frames.device)
        return torch.stack([frames[first + k] for k in range(self.stem_frames)], dim=1)


class VideoEncoder(nn.Module):
    """Mouth crops to features, 25 a second.

    Attributes:
        config: the shape.
        width: size of a feature vector.
        frames_per_second: 25.
        frozen: when True the module stays in eval mode and its parameters take no gradient.
    """

    frames_per_second = 25
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: VideoEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config or VideoEncoderConfig()
        self.width = self.config.width
        self.frozen = False
        self.front_end = FrontEnd(self.config)
        self.transformer = HubertEncoderStableLayerNorm(_hubert_config(self.config))
        self.register_buffer("feature_mean", torch.zeros(self.width))
        self.register_buffer("feature_std", torch.ones(self.width))

    @property
    def settings(self) -> dict[str, Any]:
        """What besides the weights decides the features (JSON values), for their fingerprint."""
        return {"kind": "video_encoder", **asdict(self.config)}

    def freeze(self) -> VideoEncoder:
        """Stop gradients and stay in eval mode for good: BatchNorm statistics and dropout are then at rest."""
        self.frozen = True
        self.requires_grad_(False)
        self.train(False)
        return self

    def train(self, mode: bool = True) -> VideoEncoder:
        """Switch mode as usual, except that a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Encode clips.

        Args:
            clips: uint8 tensors [T, H, W], H and W at least ``config.crop`` (96 x 96 as stored); larger frames are
                cropped at their centre. ``T`` may differ from clip to clip and is at least 1.

        Returns:
            One tensor [T, width] a clip.

        Raises:
            UserError: a clip has another type or shape.
        """
        lengths = [len(clip) for clip in clips]
        frames = self.front_end([self._normalise(clip) for clip in clips])
        hidden_BTD = pad_sequence(list(frames.split(lengths)), batch_first=True)
        lengths_B = torch.tensor(lengths, device=hidden_BTD.device)
        valid_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) < lengths_B[:, None]
        hidden_BTD = self.transformer(hidden_BTD, attention_mask=valid_BT).last_hidden_state
        hidden_BTD = (hidden_BTD - self.feature_mean) / self.feature_std
        return [hidden_TD[:length] for hidden_TD, length in zip(hidden_BTD, lengths, strict=True)]

    def _normalise(self, clip: Tensor) -> Tensor:
        """uint8 [T, H, W] to a normalised centre crop [T, crop / downsample, crop / downsample]."""
        crop = self.config.crop
        if clip.ndim != 3 or clip.dtype != torch.uint8 or len(clip) == 0 or min(clip.shape[1:]) < crop:
            raise UserError(
                f"A video clip must be uint8 [T >= 1, H >= {crop}, W >= {crop}], "
                f"not {clip.dtype} {list(clip.shape)}; prepare it as mouth crops of 96 x 96."
            )
        top, left = (clip.shape[1] - crop) // 2, (clip.shape[2] - crop) // 2
        pixels = clip[:, top : top + crop, left : left + crop].to(self.feature_mean.device, self.feature_mean.dtype)
        if self.config.downsample > 1:
            pixels = F.avg_pool2d(pixels[:, None], self.config.downsample)[:, 0]
        return (pixels / 255.0 - self.config.pixel_mean) / self.config.pixel_std

    def save_pretrained(self, directory: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Write ``config.json`` (with ``extra`` entries beside the shape) and ``model.safetensors``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        document = {"format": FORMAT, "encoder": asdict(self.config), **(extra or {})}
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, directory / WEIGHTS_FILE)
        (directory / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, frozen: bool = True
    ) -> VideoEncoder:
        """Load what `save_pretrained` wrote, frozen unless asked otherwise.

        Raises:
            UserError: a file is missing, damaged or of another format.
        """
        directory = Path(directory)
        config = _read_config(directory / CONFIG_FILE)
        encoder = cls(config).to(dtype)
        weights = directory / WEIGHTS_FILE
        try:
            encoder.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{weights} cannot be read as this video encoder ({error}). Make it again.") from error
        return encoder.freeze() if frozen else encoder


def _read_config(path: Path) -> VideoEncoderConfig:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Make a video encoder with `python -m mome_dist.pretrain_video`."
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a video encoder of format {FORMAT!r}. Make the encoder again.")
    shape = document.get("encoder")
    known = {field.name for field in fields(VideoEncoderConfig)}
    if not isinstance(shape, dict) or set(shape) != known:
        raise UserError(f"{path}: key 'encoder' must have exactly the keys {sorted(known)}. Make the encoder again.")
    return VideoEncoderConfig(**shape)


def _hubert_config(config: VideoEncoderConfig) -> HubertConfig:
    hubert = HubertConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn_width,
        num_conv_pos_embeddings=config.position_kernel,
        num_conv_pos_embedding_groups=config.position_groups,
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        activation_dropout=config.dropout,
        layerdrop=0.0,
    )
    hubert._attn_implementation = "sdpa"
    return hubert
