"""Decoding ahead: threads read and transform the clips of the next step while the current one is trained on.

Decoders release Python's lock while they work, so threads do not hold up the training thread, and what they return is a
pure function of what was asked for: the number of threads and their order change nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import Audio, Video
from mome_dist.data.transforms import Augmentation

Wanted = tuple[str, Utterance, int]
"""A stream ("audio" or "video"), an utterance and a draw (see `mome_dist.data.seeding`)."""


class Clip(NamedTuple):
    """A clip as it is trained on.

    Attributes:
        samples: audio, float32 [samples], or video, uint8 [T, H, W].
        noise: what `mome_dist.data.noise.add` says of it; None without a source of noise, and for video.
    """

    samples: Audio | Video
    noise: Mapping[str, Any] | None = None


class ClipLoader:
    """Reads the clips of a corpus as they are trained on.

    Args:
        corpus: to read.
        augmentation: what is done to every clip.
        threads: that read; at least 1.
    """

    def __init__(self, corpus: Corpus, augmentation: Augmentation, threads: int) -> None:
        self._corpus, self._augmentation = corpus, augmentation
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="clips")
        self._started: dict[Wanted, Future[Clip]] = {}

    def start(self, wanted: Sequence[Wanted]) -> None:
        """Begin to read clips that will be taken next, and give up those that were begun and are not among them."""
        before, self._started = self._started, {}
        for each in wanted:
            self._started[each] = before.pop(each) if each in before else self._threads.submit(self.read, *each)
        for future in before.values():
            future.cancel()

    def take(self, wanted: Sequence[Wanted]) -> tuple[list[Clip], float]:
        """The clips, and the seconds that they had to be waited for.

        Raises:
            DamagedDataError: if one of them cannot be read.
        """
        began = time.monotonic()
        self.start(wanted)
        clips = [self._started[each].result() for each in wanted]
        self._started = {}
        return clips, time.monotonic() - began

    def read(self, stream: str, utterance: Utterance, draw: int) -> Clip:
        """One clip, transformed.

        Raises:
            DamagedDataError: if it cannot be read.
        """
        if stream == "audio":
            return Clip(*self._augmentation.audio(self._corpus.audio(utterance), utterance, draw))
        return Clip(self._augmentation.video(self._corpus.video(utterance), utterance, draw))

    def close(self) -> None:
        """Give up what was begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)
