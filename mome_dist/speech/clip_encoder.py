"""What every encoder of mouth crops shares: pixels, length masks, freezing, and its files.

A video encoder reads 25 grey mouth crops a second: a convolutional front end turns each frame and its neighbours into
one vector, and a Transformer with a convolutional positional embedding and pre-layer-norm blocks reads the vectors. The
Transformer is the one of `transformers`' Hubert ("stable layer norm").

Padding is never content. The front end runs on the frames of all clips laid end to end, with zero frames between clips
and only valid frames kept, so that not even a BatchNorm statistic sees padding; the Transformer masks attention to each
clip's length. A clip's output is the same alone and in any batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import HubertEncoderStableLayerNorm

from mome_dist.errors import UserError
from mome_dist.files import save_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class ClipShape(Protocol):
    """What the shape of any video encoder says.

    Attributes:
        crop: side in pixels of the square cut from the centre of each frame.
        pixel_mean, pixel_std: statistics of grey values in [0, 1].
        width: size of the Transformer and of the output features.
        layers, heads, ffn_width: the Transformer.
        position_kernel, position_groups: the convolutional positional embedding.
        dropout: in the Transformer, while training.
    """

    # Properties, since the shapes are frozen.
    @property
    def crop(self) -> int: ...
    @property
    def pixel_mean(self) -> float: ...
    @property
    def pixel_std(self) -> float: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def ffn_width(self) -> int: ...
    @property
    def position_kernel(self) -> int: ...
    @property
    def position_groups(self) -> int: ...
    @property
    def dropout(self) -> float: ...


class ClipEncoder(nn.Module):
    """Base of the video encoders.

    A subclass names the format of its files, the class of its shape, and its front end, which is made of the shape and
    maps normalised clips [T_i, crop, crop] to [sum T_i, width], in order; no frame may see a frame of another clip.

    Args:
        config: the shape; by default the one that its class has.

    Attributes:
        config: the shape.
        width: size of a feature vector.
        frames_per_second: 25.
        frozen: when True the module stays in eval mode and its parameters take no gradient.
    """

    format: ClassVar[str]
    shape: ClassVar[type[Any]]
    front_end_class: ClassVar[type[Any]]

    frames_per_second = 25

    def __init__(self, config: ClipShape | None = None) -> None:
        super().__init__()
        config = self.shape() if config is None else config
        self.config: Any = config
        self.width = config.width
        self.frozen = False
        self.front_end = self.front_end_class(config)
        self.transformer = HubertEncoderStableLayerNorm(_hubert_config(config))

    def shrink(self, pixels_THW: Tensor) -> Tensor:
        """What a subclass does to the cropped pixels before they are normalised: nothing."""
        return pixels_THW

    @property
    def settings(self) -> dict[str, Any]:
        """What besides the weights decides the features (JSON values), for their fingerprint."""
        return {"kind": self.format.partition("/")[0].removeprefix("mome_dist."), **asdict(self.config)}

    def freeze(self) -> Self:
        """Stop gradients and stay in eval mode for good: BatchNorm statistics and dropout are then at rest."""
        self.frozen = True
        self.requires_grad_(False)
        self.train(False)
        return self

    def set_precision(self, dtype: torch.dtype) -> Self:
        """Cast the weights to a dtype.

        Scales of BatchNorms, their statistics and those of features stay fp32 or better: torch applies them to pictures
        of any precision, and they cost nothing.
        """
        self.to(_statistics(dtype))
        for module in self.modules():
            if not isinstance(module, nn.BatchNorm2d):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        return self

    def train(self, mode: bool = True) -> Self:
        """Switch mode as usual, except that a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that take a gradient, by name: none of a frozen encoder but those of an attached LoRA."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

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
        vectors = self.front_end([self._normalise(clip) for clip in clips])
        hidden_BTD = pad_sequence(list(vectors.split(lengths)), batch_first=True)
        valid_BT = length_mask(lengths, hidden_BTD.device)
        hidden_BTD = self.transformer(hidden_BTD, attention_mask=valid_BT).last_hidden_state
        return [hidden_TD[:length] for hidden_TD, length in zip(hidden_BTD, lengths, strict=True)]

    def _normalise(self, clip: Tensor) -> Tensor:
        """uint8 [T, H, W] to a normalised centre crop [T, crop, crop], or less where it is shrunk."""
        crop = self.config.crop
        if clip.ndim != 3 or clip.dtype != torch.uint8 or len(clip) == 0 or min(clip.shape[1:]) < crop:
            raise UserError(
                f"A video clip must be uint8 [T >= 1, H >= {crop}, W >= {crop}], "
                f"not {clip.dtype} {list(clip.shape)}; prepare it as mouth crops of 96 x 96."
            )
        top, left = (clip.shape[1] - crop) // 2, (clip.shape[2] - crop) // 2
        weight = self.transformer.layer_norm.weight
        pixels = clip[:, top : top + crop, left : left + crop].to(weight.device, _statistics(weight.dtype))
        # Rounded once, at the end: grey values near the mean would lose most of their digits in bf16.
        return ((self.shrink(pixels) / 255.0 - self.config.pixel_mean) / self.config.pixel_std).to(weight.dtype)

    def save_pretrained(self, directory: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Write ``config.json`` (with ``extra`` entries beside the shape) and ``model.safetensors``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        document = {"format": self.format, "encoder": asdict(self.config), **(extra or {})}
        save_tensors({name: value.contiguous() for name, value in self.state_dict().items()}, directory / WEIGHTS_FILE)
        (directory / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype = torch.float32, frozen: bool = True) -> Self:
        """Load what `save_pretrained` wrote, frozen unless asked otherwise.

        Args:
            dtype: of the weights, see `set_precision`.

        Raises:
            UserError: a file is missing, damaged or of another format.
        """
        directory = Path(directory)
        document = read_document(directory)
        path = directory / CONFIG_FILE
        if document.get("format") != cls.format:
            raise UserError(
                f"{path} does not describe a video encoder of format {cls.format!r}. Make the encoder again."
            )
        shape = document.get("encoder")
        known = {field.name for field in fields(cls.shape)}
        if not isinstance(shape, dict) or set(shape) != known:
            raise UserError(
                f"{path}: key 'encoder' must have exactly the keys {sorted(known)}. Make the encoder again."
            )
        encoder = cls(cls.shape(**shape)).set_precision(dtype)
        weights = directory / WEIGHTS_FILE
        try:
            encoder.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{weights} cannot be read as this video encoder ({error}). Make it again.") from error
        return encoder.freeze() if frozen else encoder


def read_document(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a video encoder.

    Raises:
        UserError: if it is missing or no JSON object.
    """
    path = directory / CONFIG_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Make a video encoder with `mome-dist pretrain video` or "
            "`mome-dist convert avhubert`."
        ) from error
    if not isinstance(document, dict):
        raise UserError(f"{path} holds no JSON object. Make the encoder again.")
    return document


def neighbourhoods(clips: Sequence[Tensor], size: int) -> Tensor:
    """Stack each frame with its neighbours, as a 3-D convolution of depth ``size`` sees them.

    With one input channel such a convolution is a 2-D one whose channels are the neighbouring frames: the same sum, and
    far faster on a CPU.

    Args:
        clips: [T_i, H, W].
        size: frames, odd.

    Returns:
        [sum T_i, size, H, W], zeros beyond a clip's ends.
    """
    margin = size // 2
    frames = torch.cat([F.pad(clip, (0, 0, 0, 0, margin, margin)) for clip in clips])
    starts, offset = [], 0
    for clip in clips:
        starts.append(torch.arange(offset, offset + len(clip)))
        offset += len(clip) + 2 * margin
    first = torch.cat(starts).to(frames.device)
    return torch.stack([frames[first + k] for k in range(size)], dim=1)


class PointwiseConvolution(nn.Conv2d):
    """A 1x1 convolution with a stride and no bias: one of stride 1 on the pixels that it reads.

    The same sums. oneDNN's own strided form writes beyond its buffers in the backward pass, where the CPU has AVX2 and
    no AVX-512, pictures are stored channels last and have fewer than 8 channels (seen in torch 2.13).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map [frames, in, H, W] to [frames, out, H / stride, W / stride]."""
        down, right = self.stride
        return F.conv2d(x_NCHW[:, :, ::down, ::right], self.weight)


def length_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """True where a padded batch holds content, bool [B, max T]."""
    lengths_B = torch.tensor(lengths, device=device)
    return torch.arange(max(lengths), device=device) < lengths_B[:, None]


def _statistics(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics have beside weights of another: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _hubert_config(shape: ClipShape) -> HubertConfig:
    hubert = HubertConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.ffn_width,
        num_conv_pos_embeddings=shape.position_kernel,
        num_conv_pos_embedding_groups=shape.position_groups,
        hidden_dropout=shape.dropout,
        attention_dropout=shape.dropout,
        activation_dropout=shape.dropout,
        layerdrop=0.0,
    )
    hubert._attn_implementation = "sdpa"
    return hubert
