"""Features of a corpus through the frozen encoders of a run: computed once, shared by all ranks and later runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import Tensor, nn

from mome_dist.artefact import manifest_sha256
from mome_dist.config.derived import lora_of
from mome_dist.config.schema import RunConfig
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.features import FeatureStore, build_features, encoder_fingerprint, feature_directory
from mome_dist.hub import name_of
from mome_dist.llm.precision import dtype_of
from mome_dist.paths import cache_root
from mome_dist.speech.clip_encoder import ClipEncoder
from mome_dist.speech.lora import attach_lora
from mome_dist.speech.video_encoders import load_video_encoder
from mome_dist.speech.whisper import Padding, WhisperAudioEncoder

Encoder = WhisperAudioEncoder | ClipEncoder


def load_encoder(config: RunConfig, stream: str, device: torch.device) -> Encoder:
    """The frozen encoder of a stream ("audio" or "video"), on a device, with LoRA at its initial values if it trains.

    Its weights have the stream's precision, LoRA's are fp32.

    Raises:
        UserError: if its directory is missing or incomplete.
    """
    encoder: Encoder
    if stream == "audio":
        padding = cast(Padding, config.audio_encoder.padding)  # the schema allows no other values
        encoder = WhisperAudioEncoder.from_pretrained(
            config.audio_encoder.path, padding, dtype_of(config.audio_encoder.precision), config.audio_encoder.normalize
        )
    else:
        encoder = load_video_encoder(config.video_encoder.path, dtype_of(config.video_encoder.precision))
    if (lora := lora_of(config).get(stream)) is not None:
        attach_lora(encoder, lora.rank, lora.alpha, lora.targets, config.seed)
    return encoder.to(device)


def split_features(
    config: RunConfig,
    corpus: Corpus,
    split: str,
    stream: str,
    encoder: nn.Module,
    rank: int,
    world_size: int,
    barrier: Callable[[], None],
    share: Callable[[list[str]], list[str]],
    console: Console | None = None,
) -> FeatureStore:
    """The features of a whole split, encoded by all ranks together where the store does not hold them yet.

    The store is in ``data.features_dir``, or in the cache.
    """
    assert isinstance(encoder, Encoder)
    device = next(encoder.parameters()).device
    read = corpus.audio if stream == "audio" else corpus.video

    def encode(utterances: Sequence[Utterance]) -> list[Tensor]:
        with torch.no_grad():
            return encoder([torch.from_numpy(read(utterance)).to(device) for utterance in utterances])

    path = getattr(config, f"{stream}_encoder").path
    name = f"{name_of(path)}-{encoder_fingerprint(encoder, encoder.settings)}"
    root = Path(config.data.features_dir or cache_root() / "features")
    directory = feature_directory(root, manifest_sha256(corpus.directory), name, split)
    return build_features(
        name, encode, corpus.split(split), directory, rank, world_size, barrier, share, console=console
    )
