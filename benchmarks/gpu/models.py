"""Frozen models of given sizes with random weights, made on the device: nothing is fetched, nothing is read.

Directories hold what says their sizes and the LLM's words, so that all code that reads sizes reads these, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LlamaConfig, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mome_dist.config.derived import streams_of, views_of
from mome_dist.config.load import load_config
from mome_dist.config.schema import RunConfig
from mome_dist.data.encoding import Encoder
from mome_dist.llm.megatron import FrozenLLM, build_frozen_llm
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.tiny import word_tokenizer
from mome_dist.parallel.layout import Layout
from mome_dist.planning.encoder_shapes import VIDEO_SIZES, WHISPERS, encoder_shape
from mome_dist.planning.llms import find_shape
from mome_dist.speech.avhubert.config import AVHubertConfig
from mome_dist.speech.avhubert.model import AVHubertEncoder
from mome_dist.speech.projector import Projectors
from mome_dist.speech.whisper import Padding, WhisperAudioEncoder

WEIGHT_SCALE = 0.02  # of the LLM's weights, as such models start with
HEAD_SIZE = 64  # of both encoders
WORDS = ["a", "clip", "says", "a", "few", "words", "and", "then", "some", "more", "of", "them"]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        llm: dimensions of the frozen LLM.
        whisper: keys of Whisper's ``config.json``.
        avhubert: keys of `AVHubertConfig`.
        overrides: of the run's configuration; the default is the paper's.
        clips: of a step.
        seconds: of each clip.
        text_tokens: of its text.
    """

    llm: LLMShape
    whisper: Mapping[str, int]
    avhubert: Mapping[str, Any]
    overrides: tuple[str, ...]
    clips: int
    seconds: float
    text_tokens: int


def _whisper(layers: int, width: int, mels: int = 80) -> dict[str, int]:
    return {"d_model": width, "encoder_layers": layers, "encoder_ffn_dim": 4 * width, "num_mel_bins": mels}


# A GPU's share of a step of the paper's job: 1,500 video frames in four views.
PAPER = Sizes(
    llm=find_shape("llama-3.2-3b"),
    whisper=_whisper(*WHISPERS["medium"]),
    avhubert=VIDEO_SIZES["avhubert-large"],
    overrides=("experiment=lrs3",),
    clips=10,
    seconds=6.0,
    text_tokens=32,
)
TINY = Sizes(
    llm=replace(
        find_shape("llama-3.2-3b"),
        vocabulary=512,
        hidden_size=64,
        ffn_size=96,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=16,
        max_positions=1024,
    ),
    whisper=_whisper(1, 64),
    avhubert={
        **VIDEO_SIZES["avhubert-large"],
        "trunk_widths": (4, 4, 4, 4),
        "trunk_blocks": 1,
        "layers": 1,
        "width": 64,
        "ffn_width": 128,
        "position_kernel": 8,
    },
    overrides=("experiment=lrs3", "projector.hidden_size=32", "audio_encoder.padding=clip", "mome.bottleneck=4"),
    clips=2,
    seconds=1.0,
    text_tokens=5,
)


def configuration(sizes: Sizes, folder: Path) -> RunConfig:
    """The run's configuration, with directories that say the models' sizes."""
    llm = sizes.llm
    tokenizer = word_tokenizer(WORDS)
    tokenizer.save_pretrained(folder / "llm")
    LlamaConfig(
        architectures=[llm.architecture],
        vocab_size=llm.vocabulary,
        hidden_size=llm.hidden_size,
        intermediate_size=llm.ffn_size,
        num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads,
        head_dim=llm.head_size,
        max_position_embeddings=llm.max_positions,
        rms_norm_eps=llm.norm_epsilon,
        rope_theta=llm.rope_base,
        tie_word_embeddings=False,  # Megatron-Core keeps two tables in any case
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(folder / "llm")
    video = {"format": AVHubertEncoder.format, "encoder": dict(sizes.avhubert)}
    for name, document in (("audio_encoder", dict(sizes.whisper)), ("video_encoder", video)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(document), encoding="utf-8")
    paths = [f"{name}.path={folder / name}" for name in ("llm", "audio_encoder", "video_encoder")]
    batch = ["data.max_frames=null", f"data.batch_size={sizes.clips}"]
    # The words of the tiny LLM have its tags.
    return load_config([*sizes.overrides, "llm=tiny", *paths, *batch, "llm.precision=bf16"])


def text_of(sizes: Sizes) -> str:
    """A text of as many tokens as the sizes say, one a word."""
    return " ".join(WORDS[number % len(WORDS)] for number in range(sizes.text_tokens))


@torch.no_grad()
def random_llm(config: RunConfig, layout: Layout, device: torch.device) -> FrozenLLM:
    """The frozen LLM in bf16, made on the device."""
    with device:
        llm = build_frozen_llm(
            LLMShape.from_directory(config.llm.path), torch.bfloat16, config.llm.attention, device, layout
        )
    for name, parameter in llm.named_parameters():
        if "norm" in name:
            parameter.fill_(1)
        else:
            parameter.normal_(std=WEIGHT_SCALE)
    return llm


def random_projectors(config: RunConfig) -> Projectors:
    """The projectors of a run with their initial values."""
    views, settings = views_of(config), config.projector
    streams = streams_of(config)
    projectors = Projectors(
        {stream: encoder_shape(config, stream).width for stream in streams},
        {stream: sorted({getattr(view, f"{stream}_rate") for view in views} - {None}) for stream in streams},
        LLMShape.from_directory(config.llm.path).hidden_size,
        settings.hidden_size,
        settings.per_rate,
        settings.compression,
        settings.layer_norm,
        None if settings.mixture is None else asdict(settings.mixture),
    )
    projectors.initialize(config.seed, WEIGHT_SCALE)
    return projectors


def random_whisper(config: RunConfig, device: torch.device) -> WhisperAudioEncoder:
    """Whisper's encoder in fp32, made on the device."""
    sizes = json.loads((Path(config.audio_encoder.path) / "config.json").read_text(encoding="utf-8"))
    whisper = WhisperConfig(**sizes, encoder_attention_heads=sizes["d_model"] // HEAD_SIZE)
    with device:
        encoder = WhisperEncoder(whisper)
    extractor = WhisperFeatureExtractor(feature_size=sizes["num_mel_bins"])
    return WhisperAudioEncoder(encoder, extractor, cast(Padding, config.audio_encoder.padding))


def random_avhubert(config: RunConfig, device: torch.device) -> AVHubertEncoder:
    """AV-HuBERT in fp32, made on the device."""
    document = json.loads((Path(config.video_encoder.path) / "config.json").read_text(encoding="utf-8"))
    sizes = document["encoder"]
    with device:
        return AVHubertEncoder(AVHubertConfig(**sizes, heads=sizes["width"] // HEAD_SIZE)).freeze()


def random_encoders(config: RunConfig, device: torch.device) -> dict[str, Encoder]:
    """Both, by stream."""
    return {"audio": random_whisper(config, device), "video": random_avhubert(config, device)}
