"""The video encoder that a directory holds, whatever its kind: its ``config.json`` names the format."""

from __future__ import annotations

from pathlib import Path

import torch

from mome_dist.errors import UserError
from mome_dist.speech.avhubert import AVHubertEncoder
from mome_dist.speech.clip_encoder import CONFIG_FILE, ClipEncoder, read_document
from mome_dist.speech.video_encoder import VideoEncoder

KINDS: dict[str, type[ClipEncoder]] = {kind.format: kind for kind in (VideoEncoder, AVHubertEncoder)}


def load_video_encoder(directory: str | Path, dtype: torch.dtype = torch.float32) -> ClipEncoder:
    """Load a frozen video encoder with weights of a dtype.

    Raises:
        UserError: a file is missing, damaged or of an unknown format.
    """
    directory = Path(directory)
    found = read_document(directory).get("format")
    if found not in KINDS:
        raise UserError(
            f"{directory / CONFIG_FILE} has format {found!r}, which is no video encoder; known are {', '.join(KINDS)}."
        )
    return KINDS[found].from_pretrained(directory, dtype)
