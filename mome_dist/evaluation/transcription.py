"""One clip of a user's own, through the encoders and the LLM to text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mome_dist.checkpoint.load import LoadedRun
from mome_dist.data.media import Media
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.data.preparation.mouth import NoFaceError, crop_mouth, is_mouth_crop
from mome_dist.errors import UserError
from mome_dist.evaluation.decoding import decode
from mome_dist.evaluation.run import streams_of
from mome_dist.speech.views import View


def clips_of(media: Media, view: View, file: Path) -> dict[str, Tensor]:
    """The raw clip of each stream that the view reads; of video, the mouth, cropped as for a corpus.

    Raises:
        UserError: the file lacks a stream, or its video shows no face for too long.
    """
    clips = {}
    for stream in streams_of(view):
        values = getattr(media, stream)
        option = f"--{stream}-rate"
        if values is None:
            raise UserError(f"{file} has no {stream} stream: leave out {option}, or give a file that has one.")
        if stream == "video" and not is_mouth_crop(values):
            try:
                values = crop_mouth(values, FaceMesh().track(values))
            except NoFaceError as error:
                raise UserError(f"{file}: {error}: show one face throughout, or leave out {option}.") from error
        clips[stream] = torch.from_numpy(values)
    return clips


def transcribe(run: LoadedRun, view: View, clips: dict[str, Tensor], num_beams: int | None = None) -> str:
    """Text of one clip: encode each stream, then decode."""
    encoders = run.encoders()
    with torch.no_grad():
        features = {stream: list(encoders[stream]([clip.to(run.device)])) for stream, clip in clips.items()}
    decoding = run.config.decoding if num_beams is None else replace(run.config.decoding, num_beams=num_beams)
    audio, video = (features.get(stream, []) for stream in ("audio", "video"))
    return decode(run.model, run.sequences, view, audio, video, decoding)[0]
