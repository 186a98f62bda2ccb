"""Speech features to text: deterministic beam search, batched without any effect on the result.

Clips of similar length share a batch, left-padded; masks keep padding out of attention and positions, and MoME in its
local form drops nothing, so a clip's text does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

from torch import Tensor, nn

from mome_dist.config.schema import DecodingConfig
from mome_dist.errors import UserError
from mome_dist.evaluation.activations import ActivationRecorder
from mome_dist.speech.matryoshka import compressed_length
from mome_dist.speech.projector import Projectors
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.sequence import SequenceBuilder
from mome_dist.speech.views import View


def check_view(projectors: Projectors, view: View) -> None:
    """Check that a model can read a view; rates that it never trained on are fine if a projector takes them.

    Raises:
        UserError: the model has no projector for a stream, or none for its rate.
    """
    for stream, rate in (("audio", view.audio_rate), ("video", view.video_rate)):
        if rate is None:
            continue
        if stream not in projectors.streams:
            raise UserError(f"rates: {view} needs {stream}, but this model was trained without {stream}.")
        if not projectors.supports(stream, rate):
            known = ", ".join(key.removeprefix("rate") for key in cast(nn.ModuleDict, projectors.streams[stream]))
            raise UserError(
                f"rates: {view} needs this model to project {stream} at rate {rate}; it has a projector per rate, "
                f"for {known}: choose one of them."
            )


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first (what does not fit in memory fails at once), stable."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def decode_batch(
    model: MoMESpeechLM,
    sequences: SequenceBuilder,
    view: View,
    audio: Sequence[Tensor],
    video: Sequence[Tensor],
    num_beams: int,
    max_new_tokens: int,
    recorder: ActivationRecorder | None = None,
) -> list[list[int]]:
    """Decode one batch of clips to token ids, without the end token.

    Args:
        audio, video: features of each clip, float [T_i, d]; only the streams of the view are read.
        recorder: counts the experts that the prefixes choose.
    """
    device = model.llm.get_input_embeddings().weight.device
    clips = max(len(audio) if view.audio_rate is not None else 0, len(video) if view.video_rate is not None else 0)
    audio = [clip.to(device) for clip in audio] if view.audio_rate is not None else []
    video = [clip.to(device) for clip in video] if view.video_rate is not None else []
    prefixes = [
        sequences.prefix(
            view,
            compressed_length(len(audio[i]), view.audio_rate) if view.audio_rate is not None else 0,
            compressed_length(len(video[i]), view.video_rate) if view.video_rate is not None else 0,
        )
        for i in range(clips)
    ]
    with recorder.recording(view, prefixes) if recorder is not None else nullcontext():
        return model.generate(
            prefixes,
            view,
            audio,
            video,
            eos=sequences.codec.eos,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
        )


def decode(
    model: MoMESpeechLM,
    sequences: SequenceBuilder,
    view: View,
    audio: Sequence[Tensor],
    video: Sequence[Tensor],
    config: DecodingConfig,
) -> list[str]:
    """Decode any number of clips, in batches of similar length.

    Args:
        model: in eval mode.
        view: task and rates; see `check_view`.
        audio, video: encoder features of each clip, float [T_i, d]; the stream that a view does not use may be empty.
        config: beams, the most new tokens, batch size.

    Returns:
        One text a clip, in the order of the input.

    Raises:
        UserError: the model cannot read the view, or the batch size is not positive.
    """
    check_view(model.projectors, view)
    used = [clips for clips, rate in ((audio, view.audio_rate), (video, view.video_rate)) if rate is not None]
    lengths = [sum(map(len, streams)) for streams in zip(*used, strict=True)]
    texts = [""] * len(lengths)
    for batch in batches_by_length(lengths, config.batch_size):
        heard, seen = ([clips[i] for i in batch] if clips else [] for clips in (audio, video))
        written = decode_batch(model, sequences, view, heard, seen, config.num_beams, config.max_new_tokens)
        for index, ids in zip(batch, written, strict=True):
            texts[index] = sequences.codec.decode(ids)
    return texts
