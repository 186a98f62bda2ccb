"""A view is one way to look at an utterance: a task and the rates at which its streams are compressed.

Matryoshka training sees every utterance in several views; at inference any view of the same weights can be chosen.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TASKS = ("asr", "vsr", "avsr")


@dataclass(frozen=True)
class View:
    """Task and rates; a rate of None means that the stream is not used."""

    task: str
    audio_rate: int | None
    video_rate: int | None

    @property
    def rates(self) -> str:
        """The rates as in the papers: "(4)" for one stream, "(4,2)" for audio and video."""
        return f"({','.join(str(rate) for rate in (self.audio_rate, self.video_rate) if rate is not None)})"

    def __str__(self) -> str:
        return f"{self.task}{self.rates}"


def all_views(
    tasks: Sequence[str],
    asr_audio_rates: Sequence[int],
    vsr_video_rates: Sequence[int],
    avsr_audio_rates: Sequence[int],
    avsr_video_rates: Sequence[int],
) -> list[View]:
    """Every view of the given tasks, AVSR over all pairs of rates, in a fixed order."""
    by_task: Mapping[str, list[View]] = {
        "asr": [View("asr", rate, None) for rate in asr_audio_rates],
        "vsr": [View("vsr", None, rate) for rate in vsr_video_rates],
        "avsr": [View("avsr", audio, video) for audio in avsr_audio_rates for video in avsr_video_rates],
    }
    return [view for task in TASKS if task in tasks for view in by_task[task]]


def streams_read(views: Sequence[View]) -> list[str]:
    """The streams that some views use: "audio", "video" or both."""
    audio = any(view.audio_rate is not None for view in views)
    video = any(view.video_rate is not None for view in views)
    return [stream for stream, used in (("audio", audio), ("video", video)) if used]


def views_of_step(views: Sequence[View], per_step: int | None, step: int, seed: int) -> list[View]:
    """The views that a step trains on: all, or ``per_step`` of them.

    A pure function of (seed, step), hence equal on all ranks and after a resume. Views are dealt from reshuffled decks,
    so that over any ``len(views)`` consecutive draws within a deck each view is seen once; the mean over steps of the
    sampled loss is the mean over all views.
    """
    if per_step is None or per_step >= len(views):
        return list(views)
    drawn: list[View] = []
    for draw in range(step * per_step, (step + 1) * per_step):
        deck, card = divmod(draw, len(views))
        drawn.append(random.Random(f"views-{seed}-{deck}").sample(list(views), len(views))[card])
    return drawn
