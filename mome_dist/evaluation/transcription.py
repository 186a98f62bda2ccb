"""One clip of a user's own, through the encoders and the LLM to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mome_dist.config import RunConfig
from mome_dist.data.films import film_with
from mome_dist.data.preparation.crops import mouth_crops
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.data.preparation.mouth import NoFaceError
from mome_dist.errors import UserError
from mome_dist.evaluation.decoding import decode
from mome_dist.evaluation.run import streams_of
from mome_dist.inference.load import Encoder, LoadedRun
from mome_dist.preflight import expected_geometry
from mome_dist.speech.geometry import AVHUBERT
from mome_dist.speech.views import View


def clips_of(
    path: Path, view: View, config: RunConfig, tell: Callable[[str], object] = lambda note: None
) -> dict[str, Tensor]:
    """The raw clip of each stream that the view reads; of video, the mouth, cropped as the run's encoder expects it.

    Args:
        tell: is given what was done to the file beyond decoding it, a line each.

    Raises:
        UserError: the file cannot be read, lacks a stream, or its video shows no face for too long.
    """
    film = film_with(path, streams_of(view))
    clips = {}
    if film.has_audio:
        clips["audio"] = torch.from_numpy(film.audio())
    if film.has_video:
        geometry = expected_geometry(config.video_encoder.path) or AVHUBERT
        (mouth,) = mouth_crops(film, [(0, film.frames)], FaceMesh, geometry=geometry)
        if isinstance(mouth, NoFaceError):
            raise UserError(f"{path}: {mouth}: show one face throughout, or leave out --video-rate.") from mouth
        clips["video"] = torch.from_numpy(mouth)
    for note in film.notes:
        tell(f"{path}: {note}")
    return clips


def transcribe(
    run: LoadedRun,
    view: View,
    clips: dict[str, Tensor],
    num_beams: int | None = None,
    encoders: Mapping[str, Encoder] | None = None,
) -> str:
    """Text of one clip: encode each stream, then decode.

    Args:
        num_beams: of the search; None: as the run has it.
        encoders: of the run; None loads them.
    """
    encoders = run.encoders() if encoders is None else encoders
    with torch.no_grad():
        features = {stream: list(encoders[stream]([clip.to(run.device)])) for stream, clip in clips.items()}
    decoding = run.config.decoding if num_beams is None else replace(run.config.decoding, num_beams=num_beams)
    audio, video = (features.get(stream, []) for stream in ("audio", "video"))
    return decode(run.model, run.sequences, view, audio, video, decoding)[0]
