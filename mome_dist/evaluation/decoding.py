"""Speech features to text: deterministic beam search, batched without any effect on the result.

Clips of similar length share a batch, left-padded; masks keep padding out of attention and positions, each clip has its
own limit of length, and MoME in its local form drops nothing, so a clip's text does not depend on its neighbours. In
fp32 the texts are identical. In bf16 a matrix product may round another way in a batch of another shape, and a choice
between two tokens that are equally likely to three digits may then fall the other way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from mome_dist.adapters.terms import LowRankTerms
from mome_dist.config.schema import DecodingConfig
from mome_dist.data.media import FPS, SAMPLE_RATE
from mome_dist.errors import UserError
from mome_dist.evaluation.activations import ActivationRecorder
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.speech.matryoshka import SAMPLES_PER_AUDIO_FRAME, compressed_length
from mome_dist.speech.projector import Projectors
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.sequence import SequenceBuilder
from mome_dist.speech.views import View

EXTRA_TOKENS = 8  # beside what the length of a clip allows: for short clips of many words
AUDIO_FRAMES_PER_SECOND = SAMPLE_RATE // SAMPLES_PER_AUDIO_FRAME


def check_view(
    projectors: Projectors, view: View, terms: LowRankTerms | None = None, router: RouterSpec | None = None
) -> None:
    """Check that a model can read a view; rates that it never trained on are fine if a projector takes them.

    Args:
        terms: low-rank ones of the LLM.
        router: of the experts.

    Raises:
        UserError: the model has no projector for a stream, or none for its rate, or not all low-rank terms or no router
            of the view.
    """
    if router is not None and not router.covers(view):
        raise UserError(
            f"rates: {view} has no router in this model, which has {router.settings} that it was trained on "
            f"({', '.join(map(str, router.views))}): choose one of these."
        )
    if terms is not None and not terms.has(view):
        raise UserError(
            f"rates: {view} needs the low-rank terms {', '.join(terms.of(view))} of this model's LLM; it has "
            f"{', '.join(terms.names)} (llm.lora.terms=[{', '.join(terms.kinds)}]): choose a view that it was trained "
            "on."
        )
    for stream, rate in (("audio", view.audio_rate), ("video", view.video_rate)):
        if rate is None:
            continue
        if stream not in projectors.widths:
            raise UserError(f"rates: {view} needs {stream}, but this model was trained without {stream}.")
        if not projectors.supports(stream, rate):
            assert projectors.fixed_rates is not None
            known = ", ".join(map(str, projectors.fixed_rates[stream]))
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


def token_limit(config: DecodingConfig, seconds: float) -> int:
    """The most tokens of a clip's text: ``ceil(tokens_per_second * seconds) + EXTRA_TOKENS`` and ``max_new_tokens``,
    whichever is less; one of them may be None."""
    limits = [] if config.max_new_tokens is None else [config.max_new_tokens]
    if config.tokens_per_second is not None:
        # The product of two rounded numbers must not be the next integer by its last bit.
        limits.append(math.ceil(config.tokens_per_second * seconds - 1e-9) + EXTRA_TOKENS)
    return min(limits)


def prefixes_of(
    sequences: SequenceBuilder, view: View, audio: Sequence[Tensor], video: Sequence[Tensor]
) -> list[list[int]]:
    """What the LLM reads of each clip before it writes; only the streams of the view count."""
    heard = [compressed_length(len(clip), view.audio_rate) for clip in audio] if view.audio_rate is not None else None
    seen = [compressed_length(len(clip), view.video_rate) for clip in video] if view.video_rate is not None else None
    clips = len(heard or seen or [])
    return [
        sequences.prefix(view, audio_tokens, video_tokens)
        for audio_tokens, video_tokens in zip(heard or [0] * clips, seen or [0] * clips, strict=True)
    ]


def token_limits(view: View, audio: Sequence[Tensor], video: Sequence[Tensor], config: DecodingConfig) -> list[int]:
    """`token_limit` of each clip, from its features."""
    return [token_limit(config, seconds) for seconds in _seconds(view, audio, video)]


def _seconds(view: View, audio: Sequence[Tensor], video: Sequence[Tensor]) -> list[float]:
    """Length of each clip, of the longer stream where the view has two."""
    streams = [[len(clip) / AUDIO_FRAMES_PER_SECOND for clip in audio]] if view.audio_rate is not None else []
    streams += [[len(clip) / FPS for clip in video]] if view.video_rate is not None else []
    return [max(lengths) for lengths in zip(*streams, strict=True)]


def decode_batch(
    model: MoMESpeechLM,
    sequences: SequenceBuilder,
    view: View,
    audio: Sequence[Tensor],
    video: Sequence[Tensor],
    config: DecodingConfig,
    recorder: ActivationRecorder | None = None,
) -> list[list[int]]:
    """Decode one batch of clips to token ids, without the end token.

    Args:
        audio, video: features of each clip, float [T_i, d]; only the streams of the view are read.
        config: beams and limits; its batch size plays no part.
        recorder: counts the experts that the prefixes choose.
    """
    device = next(model.projectors.parameters()).device
    audio = [clip.to(device) for clip in audio] if view.audio_rate is not None else []
    video = [clip.to(device) for clip in video] if view.video_rate is not None else []
    prefixes = prefixes_of(sequences, view, audio, video)
    with recorder.recording(view, prefixes) if recorder is not None else nullcontext():
        return model.generate(
            prefixes,
            view,
            audio,
            video,
            eos=sequences.codec.eos,
            limits=token_limits(view, audio, video, config),
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
            static_cache=config.static_cache,
        )


def decode_tokens(
    model: MoMESpeechLM,
    sequences: SequenceBuilder,
    view: View,
    audio: Sequence[Tensor],
    video: Sequence[Tensor],
    config: DecodingConfig,
) -> list[list[int]]:
    """Decode any number of clips, in batches of similar length.

    Args:
        model: in eval mode.
        view: task and rates; see `check_view`.
        audio, video: encoder features of each clip, float [T_i, d]; the stream that a view does not use may be empty.
        config: beams, limits of length, batch size.

    Returns:
        Token ids of each clip, without the end token, in the order of the input.

    Raises:
        UserError: the model cannot read the view, or the batch size is not positive.
    """
    check_view(model.projectors, view, model.terms, model.router)
    lengths = lengths_of(view, audio, video)
    written: list[list[int]] = [[] for _ in lengths]
    for batch in batches_by_length(lengths, config.batch_size):
        heard, seen = ([clips[i] for i in batch] if clips else [] for clips in (audio, video))
        for index, ids in zip(batch, decode_batch(model, sequences, view, heard, seen, config), strict=True):
            written[index] = ids
    return written


def lengths_of(view: View, audio: Sequence[Tensor], video: Sequence[Tensor]) -> list[int]:
    """The number of features of each clip that a view reads."""
    used = [clips for clips, rate in ((audio, view.audio_rate), (video, view.video_rate)) if rate is not None]
    return [sum(map(len, streams)) for streams in zip(*used, strict=True)]


def decode(
    model: MoMESpeechLM,
    sequences: SequenceBuilder,
    view: View,
    audio: Sequence[Tensor],
    video: Sequence[Tensor],
    config: DecodingConfig,
) -> list[str]:
    """`decode_tokens` as texts, one a clip."""
    return [sequences.codec.decode(ids) for ids in decode_tokens(model, sequences, view, audio, video, config)]
