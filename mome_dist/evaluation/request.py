"""What an evaluation is asked to do, as ``key=value`` arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mome_dist.errors import UserError, first_line
from mome_dist.hints import hint
from mome_dist.speech.views import View
from mome_dist.trained import with_key

BASELINES = ("chance", "untrained")
_VIEW = re.compile(r"(asr|vsr|avsr)\((\d+)(?:,(\d+))?\)")

Request = TypeVar("Request")


@dataclass
class EvaluationRequest:
    """Arguments of ``mome_dist.evaluate``; None means: as the run's own configuration has it.

    Attributes:
        checkpoint: run directory, one checkpoint directory, or an export.
        select: which checkpoint of a run: latest, best (lowest validation loss), average:N (mean of the N newest).
        llm, audio_encoder, video_encoder: directories of frozen models that are not where the run had them.
        rates: views such as ``asr(4)`` and ``avsr(16,5)``; None for those that were trained.
        untrained_rates: whether these may be views that were not trained.
        split: of the corpus.
        corpus: another corpus than the one of the training.
        noise: of "clean", "babble" (other speakers of the training split), and directories of recordings.
        snr: ratios of speech to noise in dB, for every noise; 0 is noise as loud as speech.
        video_corruption: of "none", occlusion, blur, missing_frames and missing_video, each with ``:severity`` up to 1.
        baselines: of "chance" (speech shuffled among utterances) and "untrained" (the model before training).
        limit: only so many utterances, from the start of the split.
        num_beams, max_new_tokens, tokens_per_second, length_penalty, static_cache, batch_size, device_map: of
            decoding.
        precision: of the LLM, bf16 or fp32: in fp32 a text does not depend on the batch size either.
        compare: an earlier evaluation or its run, to compare with on the same utterances.
        output: directory of the results; None for ``evaluation/`` in the run directory.
        seed: of noise, corruptions, the shuffle of the chance baseline and the resamples of the intervals.
        timeout_seconds: after which a rank that waits for a lost one gives up.
    """

    checkpoint: str = ""
    select: str = "latest"
    llm: str | None = None
    audio_encoder: str | None = None
    video_encoder: str | None = None
    rates: Any = None
    untrained_rates: bool = False
    split: str | None = None
    corpus: str | None = None
    noise: Any = "clean"
    snr: Any = field(default_factory=lambda: [-5.0, 0.0, 5.0, 10.0])
    video_corruption: Any = "none"
    baselines: list[str] = field(default_factory=list)
    limit: int | None = None
    num_beams: int | None = None
    max_new_tokens: int | None = None
    tokens_per_second: float | None = None
    length_penalty: float | None = None
    static_cache: bool | None = None
    batch_size: int | None = None
    device_map: Any = None
    precision: str | None = None
    compare: str | None = None
    output: str | None = None
    seed: int = 0
    timeout_seconds: int = 1800


def parse_request(kind: type[Request], arguments: Sequence[str]) -> Request:
    """Fill a dataclass from ``key=value`` arguments; the first may be a place alone, and then sets its first field.

    Raises:
        UserError: an argument without ``=``, an unknown key, or a value of the wrong type.
    """
    schema = OmegaConf.structured(kind)
    arguments = with_key(arguments, next(iter(schema)))
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals and argument.startswith("-"):
            raise UserError(
                f"there are no options here, but keys: unknown {argument}{hint(argument.lstrip('-'), list(schema))}"
            )
        if not equals:
            raise UserError(f"{argument!r} is not of the form key=value; keys: {', '.join(schema)}.")
        if key not in schema:
            raise UserError(f"unknown key {key!r}{hint(key, list(schema))}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.from_dotlist(list(arguments))))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {first_line(error)}") from error


def names_of(key: str, value: Any) -> list[str]:
    """One name or a list of names, as strings.

    Raises:
        UserError: anything else.
    """
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in values):
        raise UserError(f"{key}={value}: give names, such as {key}=[a,b].")
    return values


def ratios_of(value: Any) -> list[float]:
    """One ratio in dB or a list of them; 0 is a ratio like any other.

    Raises:
        UserError: anything that is no finite number.
    """
    values = value if isinstance(value, list) else [value]
    for ratio in values:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not math.isfinite(ratio):
            raise UserError(
                f"snr={value}: give ratios in dB, such as snr=[-5,0,5]; noise=clean is speech without noise."
            )
    return [float(ratio) for ratio in dict.fromkeys(values)]


def parse_views(value: Any) -> list[View]:
    """Views from ``[asr(4),avsr(16,5)]``, which YAML has cut at every comma, or from one string.

    Raises:
        UserError: anything that is not ``asr(A)``, ``vsr(V)`` or ``avsr(A,V)``, or a rate of zero.
    """
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text.replace(" ", "")
    views: list[View] = []
    position = 0
    while position < len(text):
        match = _VIEW.match(text, position)
        end = len(text) if match is None else match.end()
        if match is None or text[end : end + 1] not in ("", ","):
            raise UserError(f"rates={text}: write views as asr(4), vsr(2) or avsr(4,2), separated by commas.")
        views.append(_view(match.group(0), match.group(1), int(match.group(2)), match.group(3)))
        position = end + 1
    if not views:
        raise UserError("rates is empty: name views such as asr(4), or leave it out for all trained ones.")
    return list(dict.fromkeys(views))


def _view(text: str, task: str, first: int, second: str | None) -> View:
    if (task == "avsr") != (second is not None):
        raise UserError(f"rates: {text} is no view; asr and vsr take one rate, avsr an audio and a video rate.")
    if first < 1 or (second is not None and int(second) < 1):
        raise UserError(f"rates: {text} is no view; a rate is the number of frames per token, at least 1.")
    if task == "avsr":
        return View(task, first, int(second or 0))
    return View(task, first, None) if task == "asr" else View(task, None, first)


def check_baselines(names: Sequence[str]) -> None:
    """Raise UserError for a baseline that there is not."""
    for name in names:
        if name not in BASELINES:
            raise UserError(f"baselines: {name!r} is unknown; choose from {', '.join(BASELINES)}.")
