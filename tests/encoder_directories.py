"""Small encoders with random weights in directories of their own, as a run names them."""

from __future__ import annotations

from pathlib import Path

from mome_dist.speech.avhubert import AVHubertConfig, AVHubertEncoder
from mome_dist.speech.geometry import RENDERED
from tests.whisper_directory import whisper_directory


def encoder_directories(folder: Path, layers: int) -> list[str]:
    """Write a Whisper and an AV-HuBERT of so many layers; return the overrides that name them."""
    whisper_directory(folder / "whisper")
    shape = AVHubertConfig(trunk_widths=(4, 8), width=32, layers=layers, heads=2, ffn_width=48)
    # As if it had been trained on the drawn mouths that tests train on.
    AVHubertEncoder(shape).save_pretrained(folder / "avhubert", {"geometry": RENDERED})
    return [f"audio_encoder.path={folder / 'whisper'}", f"video_encoder.path={folder / 'avhubert'}"]
