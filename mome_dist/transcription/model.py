"""Whoever transcribes: from films or arrays to features, and from features to texts, in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from mome_dist.config.derived import streams_of
from mome_dist.config.schema import DecodingConfig
from mome_dist.config.values import check_decoding
from mome_dist.data.films import film_with
from mome_dist.errors import UserError, first_line
from mome_dist.evaluation.checks import check_view
from mome_dist.evaluation.decoding import batches_by_length, decode_tokens, lengths_of, prefixes_of, token_limits
from mome_dist.inference.load import Encoder, LoadedRun
from mome_dist.speech.scoring import token_log_probs
from mome_dist.speech.views import View, streams_read, view_of
from mome_dist.transcription.inputs import (
    Array,
    Clip,
    Features,
    Input,
    array_clip,
    as_tensor,
    checked_features,
    film_clip,
)
from mome_dist.transcription.results import Transcription


class Transcriber:
    """What `SpeechModel` and an export as a model of transformers (`mome_dist.export.pretrained`) have in common."""

    @property
    def run(self) -> LoadedRun:
        """The model in one process."""
        raise NotImplementedError

    def frozen_encoders(self) -> Mapping[str, Encoder]:
        """Its encoders by stream, "audio" and "video"."""
        raise NotImplementedError

    @overload
    def encode(  # type: ignore[overload-overlap]  # a str is a sequence of str, and one path
        self, inputs: str | Path | Array | Clip, *, streams: Sequence[str] | None = None
    ) -> Features: ...
    @overload
    def encode(
        self, inputs: Sequence[str | Path | Array | Clip], *, streams: Sequence[str] | None = None
    ) -> list[Features]: ...
    def encode(
        self,
        inputs: str | Path | Array | Clip | Sequence[str | Path | Array | Clip],
        *,
        streams: Sequence[str] | None = None,
    ) -> Features | list[Features]:
        """Run the encoders once, for `transcribe` at any number of rates.

        Args:
            inputs: one or a list of them, as for `transcribe`.
            streams: "audio", "video" or both; None: all that the model reads, which every input then has to have.

        Raises:
            UserError: as `transcribe`.
        """
        known = streams_of(self.run.config)
        for stream in streams or ():
            if stream not in known:
                raise UserError(f"streams: {stream!r} is not what this model reads; choose from {', '.join(known)}.")
        given, many = _as_list(inputs)
        features = self._features(given, list(streams or known), self.run.config.decoding.batch_size)
        return features if many else features[0]

    @overload
    def transcribe(  # type: ignore[overload-overlap]  # as above
        self,
        inputs: Input,
        *,
        audio_rate: int | None = None,
        video_rate: int | None = None,
        num_beams: int | None = None,
        batch_size: int | None = None,
        log_probs: bool = True,
    ) -> Transcription: ...
    @overload
    def transcribe(
        self,
        inputs: Sequence[Input],
        *,
        audio_rate: int | None = None,
        video_rate: int | None = None,
        num_beams: int | None = None,
        batch_size: int | None = None,
        log_probs: bool = True,
    ) -> list[Transcription]: ...
    def transcribe(
        self,
        inputs: Input | Sequence[Input],
        *,
        audio_rate: int | None = None,
        video_rate: int | None = None,
        num_beams: int | None = None,
        batch_size: int | None = None,
        log_probs: bool = True,
    ) -> Transcription | list[Transcription]:
        """Write down what is said.

        Args:
            inputs: one or a list of: the path of an audio or video file (sound at any rate; in a video of a face the
                mouth is found and cropped, 96x96 mouth crops at 25 frames a second are taken as they are); sound as an
                array, float [samples] at 16 kHz; mouth crops as an array, uint8 [T, 96, 96] at 25 a second; both of
                them as a `Clip`; or what `encode` gave.
            audio_rate: audio frames, 50 a second, per token; None does not listen.
            video_rate: video frames, 25 a second, per token; None does not read lips.
            num_beams: 1 is greedy search; None: as the run has it.
            batch_size: clips that are encoded and decoded together; None: as the run has it.
            log_probs: whether the tokens' probabilities are wanted too, which takes one more pass.

        Returns:
            One `Transcription` for one input, a list in their order for a list.

        Raises:
            UserError: no rate, or one that the model cannot read; an input without that stream or a face, or that is
                none of the above; the message names it.
        """
        view, run = view_of(audio_rate, video_rate), self.run
        check_view(run.config, view, "rates")
        decoding = run.config.decoding
        decoding = replace(
            decoding,
            num_beams=decoding.num_beams if num_beams is None else num_beams,
            batch_size=decoding.batch_size if batch_size is None else batch_size,
        )
        check_decoding(decoding)
        given, many = _as_list(inputs)
        features = self._features(given, streams_read([view]), decoding.batch_size)
        written = self._written(view, features, decoding, log_probs)
        return written if many else written[0]

    def _features(self, inputs: Sequence[Input], streams: list[str], batch_size: int) -> list[Features]:
        """Features of every input, encoded batch by batch where they are none yet; all inputs are looked at first."""
        checked = [self._checked(given, number, streams) for number, given in enumerate(inputs)]
        found: list[Features] = []
        for start in range(0, len(checked), batch_size):
            batch = [
                film_clip(each, streams, self.run.config) if isinstance(each, Path) else each
                for each in checked[start : start + batch_size]
            ]
            encoded = iter(self._encoded([each for each in batch if isinstance(each, Clip)], streams))
            found += [next(encoded) if isinstance(each, Clip) else each for each in batch]
        return found

    def _checked(self, given: Input, number: int, streams: list[str]) -> Path | Clip | Features:
        """An input that has all streams; of a film its header says so, and it is read when its turn comes."""
        name = f"inputs[{number}]"
        if isinstance(given, Features):
            return checked_features(given, name, streams, self.run.model.projectors.widths)
        if isinstance(given, str | Path):
            return film_with(given, streams).path
        if isinstance(given, Clip | np.ndarray | Tensor):
            return array_clip(given, name, streams)
        raise UserError(
            f"{name} is a {type(given).__name__}: give the path of a film or recording, an array, a Clip, or what "
            "encode() gave."
        )

    @torch.no_grad()
    def _encoded(self, clips: Sequence[Clip], streams: list[str]) -> list[Features]:
        if not clips:
            return []
        encoders = self.frozen_encoders()
        rows: dict[str, list[Tensor | None]] = {stream: [None] * len(clips) for stream in ("audio", "video")}
        for stream in streams:
            raw = [as_tensor(getattr(clip, stream)).to(self.run.device) for clip in clips]
            rows[stream] = list(encoders[stream](raw))
        return [
            Features(rows["audio"][number], rows["video"][number], clip.seconds, clip.notes)
            for number, clip in enumerate(clips)
        ]

    def _written(
        self, view: View, features: Sequence[Features], decoding: DecodingConfig, log_probs: bool
    ) -> list[Transcription]:
        run = self.run
        audio = [each.audio for each in features if each.audio is not None] if view.audio_rate is not None else []
        video = [each.video for each in features if each.video is not None] if view.video_rate is not None else []
        ids = decode_tokens(run.model, run.sequences, view, audio, video, decoding)
        limits = token_limits(view, audio, video, decoding)
        read = [len(prefix) for prefix in prefixes_of(run.sequences, view, audio, video)]
        likely: list[tuple[float, ...] | None] = [None] * len(features)
        for batch in batches_by_length(lengths_of(view, audio, video), decoding.batch_size) if log_probs else ():
            heard, seen = ([clips[i].to(run.device) for i in batch] if clips else [] for clips in (audio, video))
            prefixes = prefixes_of(run.sequences, view, heard, seen)
            scored = token_log_probs(run.model, prefixes, view, heard, seen, [ids[i] for i in batch])
            for index, values in zip(batch, scored, strict=True):
                likely[index] = tuple(values)
        untrained: tuple[str, ...] = ()
        if view not in run.views:
            untrained = (f"{view} was not trained; trained: {', '.join(map(str, run.views))}",)
        return [
            Transcription(
                text=run.sequences.codec.decode(ids[number]),
                tokens=tuple(run.sequences.codec.pieces(ids[number])),
                token_ids=tuple(ids[number]),
                log_probs=likely[number],
                view=view,
                tokens_read=read[number],
                seconds=max(each.seconds[stream] for stream in streams_read([view])),
                complete=len(ids[number]) < limits[number],
                notes=(*each.notes, *untrained),
            )
            for number, each in enumerate(features)
        ]


class SpeechModel(Transcriber):
    """A trained model that is ready to write down what is said. `mome_dist.load` makes one.

    Args:
        run: that has been loaded.
    """

    def __init__(self, run: LoadedRun) -> None:
        self._run = run
        self._encoders: Mapping[str, Encoder] = {}

    @property
    def run(self) -> LoadedRun:
        """The model in one process, with its configuration."""
        return self._run

    @property
    def views(self) -> list[View]:
        """Tasks and rates that it was trained on."""
        return list(self._run.views)

    def frozen_encoders(self) -> Mapping[str, Encoder]:
        """Its encoders by stream, loaded when they are first needed."""
        if not self._encoders:
            self._encoders = self._run.encoders()
        return self._encoders


def device_of(name: str | torch.device | None) -> torch.device:
    """A device; None: a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={str(name)!r}: {first_line(error)}; choose another, such as 'cpu'.") from error
    return device


def _as_list(inputs: object) -> tuple[list[Input], bool]:
    """The inputs, and whether they were given as a list."""
    if isinstance(inputs, list | tuple):
        return list(inputs), True
    return [inputs], False  # type: ignore[list-item]  # what is no input is told by its place
