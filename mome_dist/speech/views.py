"""A view is one way to look at an utterance: a task and the rates at which its streams are compressed.

Matryoshka training sees every utterance in several views; at inference any view of the same weights can be chosen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mome_dist.errors import UserError

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


def view_of(audio_rate: int | None, video_rate: int | None) -> View:
    """The view that the given rates ask for.

    Raises:
        UserError: no rate, or one below 1.
    """
    if audio_rate is None and video_rate is None:
        raise UserError(
            "no rate is given: add --audio-rate A to listen, --video-rate V to read lips, or both (in Python "
            "audio_rate=A, video_rate=V)."
        )
    for option, rate in (("--audio-rate", audio_rate), ("--video-rate", video_rate)):
        if rate is not None and rate < 1:
            raise UserError(f"{option} {rate}: a rate is the number of frames per token, at least 1.")
    task = "vsr" if audio_rate is None else "asr" if video_rate is None else "avsr"
    return View(task, audio_rate, video_rate)


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


def coarser_streams(fine: View, coarse: View) -> dict[str, tuple[int, int]]:
    """The two rates of each stream that one view has coarser than another; none unless they are of one task and the
    other is no coarser in any stream."""
    both = {"audio": (fine.audio_rate, coarse.audio_rate), "video": (fine.video_rate, coarse.video_rate)}
    rates = {stream: (f, c) for stream, (f, c) in both.items() if f is not None and c is not None}
    if fine.task != coarse.task or any(f > c for f, c in rates.values()):
        return {}
    return {stream: (f, c) for stream, (f, c) in rates.items() if f < c}


@dataclass(frozen=True)
class ViewSchedule:
    """Which views the steps of a run train on: hands of one or more views, dealt from reshuffled decks.

    A step's views are a pure function of (seed, step), hence equal on all ranks and after a resume. A deck has every
    hand once, so that the mean over steps of the sampled loss is the mean over all hands.

    Attributes:
        hands: the views that come together; all hands have as many.
        per_step: hands of a step.
        seed: of the run.
    """

    hands: tuple[tuple[View, ...], ...]
    per_step: int
    seed: int

    @classmethod
    def of_views(cls, views: Sequence[View], per_step: int | None, seed: int) -> ViewSchedule:
        """All views in every step, or ``per_step`` of them."""
        if per_step is None or per_step >= len(views):
            return cls((tuple(views),), 1, seed)
        return cls(tuple((view,) for view in views), per_step, seed)

    @classmethod
    def of_rates(cls, views: Sequence[View], seed: int) -> ViewSchedule:
        """One audio rate and one video rate a step, and every task at these rates (Omni-AVSR, arXiv 2511.07253).

        Omni-AVSR draws each step by itself. Decks of all pairs have the same mean, and less variance.
        """
        audio_rates = dict.fromkeys(view.audio_rate for view in views if view.audio_rate is not None) or [None]
        video_rates = dict.fromkeys(view.video_rate for view in views if view.video_rate is not None) or [None]
        hands = (
            tuple(view for view in views if view.audio_rate in (None, audio) and view.video_rate in (None, video))
            for audio in audio_rates
            for video in video_rates
        )
        return cls(tuple(hands), 1, seed)

    def of_step(self, step: int) -> list[View]:
        """The views that a step trains on; of single views, one may come twice where two decks meet."""
        drawn: list[View] = []
        for draw in range(step * self.per_step, (step + 1) * self.per_step):
            deck, card = divmod(draw, len(self.hands))
            drawn += random.Random(f"views-{self.seed}-{deck}").sample(self.hands, len(self.hands))[card]
        return drawn

    def steps_of_decks(self, decks: int) -> int:
        """The first steps of a run that have so many whole decks."""
        return math.ceil(decks * len(self.hands) / self.per_step)

    def share(self, view: View) -> float:
        """How often a step has a view, in the mean."""
        return self.per_step * sum(view in hand for hand in self.hands) / len(self.hands)

    def share_reading(self, stream: str) -> float:
        """How many of the steps have a view that reads a stream, where no hand comes twice in a step."""
        without = sum(stream not in streams_read(hand) for hand in self.hands)
        return 1 - math.comb(without, self.per_step) / math.comb(len(self.hands), self.per_step)

    def largest(self, size: Callable[[View], int]) -> list[View]:
        """The views of the step that is the largest by the sizes of its views."""
        hands = sorted(self.hands, key=lambda hand: -sum(map(size, hand)))
        return [view for hand in hands[: self.per_step] for view in hand]
