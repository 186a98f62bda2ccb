"""The frozen audio encoder: Whisper's encoder with clip lengths that are honest.

Whisper (Radford et al., 2022) reads log-mel spectrograms of exactly 30 s and answers with 1500 feature vectors, 50 a
second. A clip shorter than that is padded with silence and only its own frames are kept, at least half a second of
them: ``max(samples // 320, 25)``.

Two paddings are offered:

``"30s"``
    the form Whisper was trained with. The default for real training.
``"clip"``
    every clip is padded to its own length rounded up to whole seconds, and clips of equal padded length share a batch.
    On short clips this is several times cheaper; the features differ, since silence no longer takes part in attention.

In both a clip's features depend on the clip alone, never on its neighbours in the batch. What the choice costs and
changes on real speech is in ``benchmarks/results/encoder_padding.md``.

In bf16 the weights, products and hidden states are bf16; the spectrogram is fp32 whatever the encoder's precision, and
so are the statistics inside a LayerNorm.

Any Whisper fits, English or multilingual, from tiny (80 mel bins, 384 wide) to large-v3 (128 mel bins, 1280 wide): its
directory says the shape. Of the weights only the encoder's are read.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mome_dist.errors import UserError
from mome_dist.speech.log_mel import LogMel
from mome_dist.speech.matryoshka import audio_frames

SAMPLE_RATE = 16_000
MAX_SECONDS = 30

Padding = Literal["30s", "clip"]


class WhisperAudioEncoder(nn.Module):
    """Whisper's encoder, frozen and always in eval mode; an attached LoRA takes gradients.

    Attributes:
        width: size of a feature vector.
        frames_per_second: 50.
        log_mel: makes the spectrograms of clips, on their device.
        padding: ``"30s"`` or ``"clip"``, see the module's docstring.
        normalize: layer-normalise each waveform first (zero mean, unit variance), as the Llama-AVSR family does.
    """

    frames_per_second = 50

    def __init__(
        self,
        encoder: WhisperEncoder,
        feature_extractor: WhisperFeatureExtractor,
        padding: Padding = "30s",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if padding not in ("30s", "clip"):
            raise UserError(f"padding={padding!r} is not a padding of the Whisper encoder: choose '30s' or 'clip'.")
        self.encoder = encoder
        self.log_mel: Callable[[Sequence[Tensor], int], Tensor] = LogMel(feature_extractor)
        self.padding = padding
        self.normalize = normalize
        self.width = int(encoder.config.d_model)
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        padding: Padding = "30s",
        dtype: torch.dtype = torch.float32,
        normalize: bool = False,
    ) -> WhisperAudioEncoder:
        """Load from a plain Hugging Face Whisper directory (``config.json``, ``model.safetensors``, ...).

        Args:
            dtype: of the weights, whatever the files have.

        Raises:
            UserError: a file is missing or the directory holds another kind of model.
        """
        directory = Path(directory)
        for name in ("config.json", "preprocessor_config.json"):
            if not (directory / name).is_file():
                raise UserError(
                    f"{directory} is no Whisper directory: {name} is missing. "
                    "Run `mome-dist fetch` or point the audio encoder at a Hugging Face Whisper directory."
                )
        if not any(directory.glob("model*.safetensors")):
            raise UserError(f"{directory} holds no weights: model.safetensors is missing. Download the model again.")
        if (found := _model_type(directory / "config.json")) != "whisper":
            raise UserError(f"{directory} holds a model of type {found!r}, not Whisper: choose another directory.")
        try:
            config = WhisperConfig.from_pretrained(directory, local_files_only=True)
            extractor = WhisperFeatureExtractor.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # transformers raises many types for damaged files
            raise UserError(f"{directory} cannot be read as a Whisper model ({error}). Download it again.") from error
        if extractor.feature_size != config.num_mel_bins:
            raise UserError(
                f"{directory}: preprocessor_config.json makes {extractor.feature_size} mel bins, config.json asks for "
                f"{config.num_mel_bins}. Download the model again."
            )
        encoder = _read_encoder(directory, config, dtype)
        return cls(encoder, extractor, padding, normalize)

    @property
    def settings(self) -> dict[str, Any]:
        """What besides the weights decides the features (JSON values), for their fingerprint."""
        return {"kind": "whisper", "padding": self.padding, "normalize": self.normalize}

    def set_precision(self, dtype: torch.dtype) -> WhisperAudioEncoder:
        """Cast the weights to a dtype."""
        self.encoder.to(dtype)
        return self

    def train(self, mode: bool = True) -> WhisperAudioEncoder:
        """Stay in eval mode whatever ``mode`` says: a frozen encoder has no dropout and no layer drop."""
        return super().train(False)

    def forward(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Encode clips.

        Args:
            waveforms: float tensors [samples] in [-1, 1] at 16 kHz, of any lengths up to 30 s.

        Returns:
            One tensor [max(samples // 320, 25), width] a clip, in the encoder's dtype and on its device.

        Raises:
            UserError: a waveform is not one-dimensional, is empty, or is longer than 30 s.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        for index, waveform in enumerate(waveforms):
            groups[self._padded_seconds(waveform)].append(index)
        features: list[Tensor | None] = [None] * len(waveforms)
        for seconds, indices in groups.items():
            encoded = self._encode([waveforms[i] for i in indices], seconds)
            for row, index in enumerate(indices):
                features[index] = encoded[row, : audio_frames(len(waveforms[index]))]
        return cast("list[Tensor]", features)

    def _padded_seconds(self, waveform: Tensor) -> int:
        if waveform.ndim != 1 or len(waveform) == 0:
            raise UserError(
                f"A waveform must be a non-empty tensor [samples], not one of shape {list(waveform.shape)}."
            )
        seconds = -(-len(waveform) // SAMPLE_RATE)
        if seconds > MAX_SECONDS:
            raise UserError(
                f"A clip lasts {len(waveform) / SAMPLE_RATE:.1f} s; Whisper reads {MAX_SECONDS} s at most. "
                "Cut the clips into shorter segments when preparing the corpus."
            )
        return MAX_SECONDS if self.padding == "30s" else seconds

    def _encode(self, waveforms: Sequence[Tensor], seconds: int) -> Tensor:
        """Encode clips that share one padded length; returns [clips, 50 * seconds, width]."""
        weight = self.encoder.conv1.weight
        clips = [waveform.detach().to(weight.device, torch.float32) for waveform in waveforms]
        if self.normalize:
            clips = [F.layer_norm(clip, clip.shape, eps=1e-8) for clip in clips]
        mel = self.log_mel(clips, seconds)
        # Whisper's own forward refuses anything but 30 s, so its parts are called one by one.
        hidden = F.gelu(self.encoder.conv1(mel.to(weight.dtype)))
        hidden = F.gelu(self.encoder.conv2(hidden)).transpose(1, 2)
        hidden = hidden + self.encoder.embed_positions.weight[: hidden.shape[1]]
        for layer in self.encoder.layers:
            hidden = layer(hidden, None)
        return self.encoder.layer_norm(hidden)


def _read_encoder(directory: Path, config: WhisperConfig, dtype: torch.dtype) -> WhisperEncoder:
    """The encoder of a Whisper whose weights may be cut into several files; the decoder is never read."""
    with torch.device("meta"):
        encoder = WhisperEncoder(config)
    weights: dict[str, Tensor] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dictionary
                    prefix, found, inside = name.partition("encoder.")
                    if found and prefix in ("", "model."):
                        weights[inside] = file.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as a Whisper model ({error}). Download it again.") from error
    expected = {name: value.shape for name, value in encoder.state_dict().items()}
    if missing := sorted(expected.keys() - weights.keys()):
        raise UserError(
            f"{directory}: the weights lack encoder.{missing[0]} and {len(missing) - 1} more. Download it again."
        )
    for name, value in weights.items():
        if value.shape != expected.get(name):
            raise UserError(
                f"{directory}: encoder.{name} has shape {list(value.shape)}, config.json asks for "
                f"{list(expected.get(name, []))}. Download it again."
            )
    encoder.load_state_dict(weights, assign=True)
    return encoder


def _model_type(config: Path) -> str:
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config} is no model configuration ({error!r}). Download the model again.") from error
