"""A Whisper with random weights and dropout, of any size, as a plain Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def whisper_directory(
    path: Path, width: int = 32, layers: int = 2, heads: int = 2, mel_bins: int = 80, **more: Any
) -> Path:
    """Write the directory; ``more`` goes to `WhisperConfig`."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        num_mel_bins=mel_bins,
        dropout=0.3,
        encoder_layerdrop=0.5,
        **{**IDS, **more},
    )
    WhisperModel(config).save_pretrained(path)
    WhisperFeatureExtractor(feature_size=mel_bins).save_pretrained(path)
    return path
