"""Work for the next step beside the current one: on a thread, and on a stream of its own where the device has streams.

The thread may wait for files and for its own stream as it likes; nobody else waits with it. Two streams share a GPU's
units, so the work fills what the other leaves idle and is done when the next step asks for it.

Memory: what the work returns is allocated on its stream and read on the caller's. The next work begins after all that
the caller's stream was given before it (`Ahead.begin`), so what the caller has let go of by then may be used again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Ahead(Generic[T]):
    """Does one piece of work at a time.

    Args:
        device: that the work is for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._begun: tuple[int, Future[T]] | None = None

    def begin(self, step: int, work: Callable[[], T]) -> None:
        """Begin the work for a step; what was begun before must have been taken."""
        assert self._begun is None, "one piece of work at a time"
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._begun = step, self._thread.submit(self._on_stream, work)

    def take(self, step: int, work: Callable[[], T]) -> T:
        """What the work for a step found, or raised: the work that was begun for it, else ``work``, done here."""
        begun, self._begun = self._begun, None
        if begun is None:
            return work()
        number, future = begun
        assert number == step, "steps follow each other"
        found = future.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return found

    def close(self) -> None:
        """Wait for what was begun, and forget it."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _on_stream(self, work: Callable[[], T]) -> T:
        if self._stream is None:
            return work()
        with torch.cuda.stream(self._stream):  # and on its device: both are a thread's own
            return work()
