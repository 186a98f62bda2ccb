"""Sizes of the frozen encoders: Whisper, AV-HuBERT and the small video encoder, from their files or by name.

Products are counted as the modules make them; a test compares the sums with what torch counts of real encoders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mome_dist.config.schema import RunConfig
from mome_dist.errors import UserError
from mome_dist.hub import name_of

VIDEO_FRAMES, AUDIO_FRAMES = 25, 50  # a second, of features
WHISPER_SECONDS = 30  # that it was trained on, and pads to


@dataclass(frozen=True)
class Transformer:
    """The Transformer of an encoder."""

    layers: int
    width: int
    ffn_width: int

    @property
    def parameters(self) -> int:
        """Weights of its linear maps; biases and norms are left out."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.ffn_width)

    def flops(self, frames: int) -> float:
        """FLOPs of a forward pass over so many frames, all of which see each other."""
        return 2 * frames * self.parameters + 4 * self.layers * frames**2 * self.width


@dataclass(frozen=True)
class Convolution:
    """A convolution or linear map before the Transformer.

    Attributes:
        parameters: weights.
        places: where it is evaluated for a frame of features.
        outputs: channels.
    """

    parameters: int
    places: int
    outputs: int

    @property
    def flops(self) -> float:
        """For a frame."""
        return 2.0 * self.parameters * self.places

    @property
    def values(self) -> int:
        """Values of its output, for a frame."""
        return self.outputs * self.places


@dataclass(frozen=True)
class EncoderShape:
    """An encoder's sizes.

    Attributes:
        name: for tables.
        stream: "audio" or "video".
        transformer: its layers.
        front: what comes before them.
        positions: parameters of the embedding of positions.
        padded: seconds that Whisper pads a clip to; None pads to whole seconds.
    """

    name: str
    stream: str
    transformer: Transformer
    front: tuple[Convolution, ...]
    positions: int = 0
    padded: int | None = None

    @property
    def width(self) -> int:
        """Size of a feature vector."""
        return self.transformer.width

    @property
    def parameters(self) -> int:
        """All frozen ones but biases and norms."""
        return self.transformer.parameters + sum(each.parameters for each in self.front) + self.positions

    def features(self, seconds: float) -> int:
        """Feature vectors of a clip."""
        return int(seconds * (AUDIO_FRAMES if self.stream == "audio" else VIDEO_FRAMES))

    def frames(self, seconds: float) -> int:
        """Frames that the Transformer reads of a clip, padding included."""
        if self.stream == "video":
            return self.features(seconds)
        return AUDIO_FRAMES * (self.padded or math.ceil(seconds))

    def front_flops(self, seconds: float) -> float:
        """FLOPs of a forward pass before the Transformer."""
        return self.frames(seconds) * sum(each.flops for each in self.front)


def whisper(name: str, sizes: Mapping[str, Any], padded: int | None) -> EncoderShape:
    """From the keys of Whisper's config.json."""
    width, mels = int(sizes["d_model"]), int(sizes["num_mel_bins"])
    transformer = Transformer(int(sizes["encoder_layers"]), width, int(sizes["encoder_ffn_dim"]))
    # Three frames wide; the second one halves the rate.
    front = (Convolution(3 * mels * width, 2, width), Convolution(3 * width**2, 1, width))
    return EncoderShape(name, "audio", transformer, front, AUDIO_FRAMES * WHISPER_SECONDS * width, padded)


def avhubert(name: str, sizes: Mapping[str, Any]) -> EncoderShape:
    """From the keys of `mome_dist.speech.avhubert.config.AVHubertConfig`."""
    widths, width, side = list(sizes["trunk_widths"]), int(sizes["width"]), _half(int(sizes["crop"]))
    front = [Convolution(sizes["stem_frames"] * sizes["stem_kernel"] ** 2 * widths[0], side**2, widths[0])]
    side, inputs = _half(side), widths[0]
    for stage, outputs in enumerate(widths):
        side = side if stage == 0 else _half(side)
        for _ in range(sizes["trunk_blocks"]):
            front += _residual(inputs, outputs, side, shortcut=inputs != outputs)
            inputs = outputs
    front += [Convolution(inputs * width, 1, width), Convolution(2 * width**2, 1, width)]
    return _video(name, sizes, front)


def visemes(name: str, sizes: Mapping[str, Any]) -> EncoderShape:
    """From the keys of `mome_dist.speech.video_encoder.VideoEncoderConfig`."""
    widths, side = list(sizes["trunk_widths"]), _half(int(sizes["crop"]) // int(sizes["downsample"]))
    front = [Convolution(sizes["stem_frames"] * 5**2 * widths[0], side**2, widths[0])]
    for inputs, outputs in pairwise(widths):
        side = _half(side)
        front += _residual(inputs, outputs, side, shortcut=True)
    return _video(name, sizes, [*front, Convolution(widths[-1] * int(sizes["width"]), 1, int(sizes["width"]))])


def _video(name: str, sizes: Mapping[str, Any], front: list[Convolution]) -> EncoderShape:
    width = int(sizes["width"])
    positions = Convolution(width * width // sizes["position_groups"] * sizes["position_kernel"], 1, width)
    transformer = Transformer(int(sizes["layers"]), width, int(sizes["ffn_width"]))
    return EncoderShape(name, "video", transformer, (*front, positions))


def _residual(inputs: int, outputs: int, side: int, shortcut: bool) -> list[Convolution]:
    """Two 3x3 convolutions, and a 1x1 one around them."""
    both = [Convolution(9 * channels * outputs, side**2, outputs) for channels in (inputs, outputs)]
    return both + ([Convolution(inputs * outputs, side**2, outputs)] if shortcut else [])


def _half(side: int) -> int:
    return -(-side // 2)


_TRUNK = {"crop": 88, "stem_frames": 5, "stem_kernel": 7, "trunk_widths": (64, 128, 256, 512), "trunk_blocks": 2}
_POSITIONS = {"position_kernel": 128, "position_groups": 16}
_SMALL = {"crop": 88, "downsample": 2, "stem_frames": 5, "trunk_widths": (16, 32, 64, 128)}
_SMALL_POSITIONS = {"position_kernel": 15, "position_groups": 4}
VIDEO_SIZES: Mapping[str, Mapping[str, Any]] = {
    "avhubert-base": {**_TRUNK, **_POSITIONS, "layers": 12, "width": 768, "ffn_width": 3072},
    "avhubert-large": {**_TRUNK, **_POSITIONS, "layers": 24, "width": 1024, "ffn_width": 4096},
    "visemes": {**_SMALL, **_SMALL_POSITIONS, "layers": 2, "width": 128, "ffn_width": 512},
}
# Layers and width of OpenAI's encoders (arXiv 2212.04356, table 1); large-v3 reads 128 mel bins, the others 80.
WHISPERS = {"tiny": (4, 384), "base": (6, 512), "small": (12, 768), "medium": (24, 1024), "large": (32, 1280)}


def encoder_shape(config: RunConfig, stream: str) -> EncoderShape:
    """The encoder that a run reads a stream with: as its directory says, or else as its directory is called.

    Raises:
        UserError: if neither tells its sizes.
    """
    section = config.audio_encoder if stream == "audio" else config.video_encoder
    path, padded = Path(section.path), WHISPER_SECONDS if config.audio_encoder.padding == "30s" else None
    file = path / "config.json"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if stream == "audio":
            return whisper(name_of(path), document, padded)
        make = avhubert if document["format"].startswith("mome_dist.avhubert/") else visemes
        return make(name_of(path), document["encoder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = _by_name(path.name.lower(), stream, padded)
        if known is None:
            raise UserError(
                f"{file} does not say how large the encoder is ({error!r}): set {stream}_encoder.path to the encoder, "
                f"or for a plan to a name: {', '.join(_names(stream))}."
            ) from error
        return known


def _names(stream: str) -> list[str]:
    return [f"whisper-{size}" for size in (*WHISPERS, "large-v3")] if stream == "audio" else list(VIDEO_SIZES)


def _by_name(name: str, stream: str, padded: int | None) -> EncoderShape | None:
    if stream == "video":
        make = visemes if name == "visemes" else avhubert
        return make(name, VIDEO_SIZES[name]) if name in VIDEO_SIZES else None
    size = name.removeprefix("whisper-").removesuffix(".en").partition("-v")[0]
    if not name.startswith("whisper-") or size not in WHISPERS:
        return None
    layers, width = WHISPERS[size]
    mels = 128 if name.endswith("-v3") else 80
    keys = {"encoder_layers": layers, "d_model": width, "encoder_ffn_dim": 4 * width, "num_mel_bins": mels}
    return whisper(name, keys, padded)
