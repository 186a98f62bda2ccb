"""Portions over processes, and how far they have come."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path

import cv2
from rich.console import Console

from mome_dist.data.preparation.clips import Clip
from mome_dist.data.preparation.portions import Portion, Preparation
from mome_dist.data.preparation.utterances import ClipPreparer
from mome_dist.errors import UserError
from mome_dist.progress import progress

_REFRESH_SECONDS = 0.5


class _LocalWatch:
    """Moves the bar of this process's own work."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.frames = 0
        self._advance = advance

    def starts(self, clip: Clip) -> None:
        pass

    def ends(self, frames: int) -> None:
        self.frames += frames
        self._advance()


class _WorkerWatch:
    """Counts clips and frames in shared memory, and keeps the clip at hand in a file, which a crash leaves behind."""

    def __init__(self, counts: SynchronizedArray[int], folder: Path) -> None:
        self._counts = counts
        self._at_hand = folder / str(os.getpid())

    def starts(self, clip: Clip) -> None:
        self._at_hand.write_text(f"{clip.name} ({clip.media})", encoding="utf-8")

    def ends(self, frames: int) -> None:
        self.leave()
        with self._counts.get_lock():
            self._counts[0] += 1
            self._counts[1] += frames

    def leave(self) -> None:
        self._at_hand.unlink(missing_ok=True)


class _Worker:
    """State of a worker process."""

    preparation: Preparation
    preparer: ClipPreparer
    watch: _WorkerWatch


def _start_worker(preparation: Preparation, counts: SynchronizedArray[int], folder: Path) -> None:
    _Worker.preparation, _Worker.preparer = preparation, ClipPreparer(preparation.settings)
    _Worker.watch = _WorkerWatch(counts, folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    signal.signal(signal.SIGTERM, _stop)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    cv2.setNumThreads(1)


def _stop(*_: object) -> None:
    """End at the pool's request, when another worker has crashed: this one's clip is not to blame."""
    _Worker.watch.leave()
    os._exit(1)


def _die_with(sentinel: int) -> None:
    """End this process when its parent is gone: nobody would wait for what it does."""
    wait_for_end([sentinel])
    os._exit(1)


def _do(portion: Portion) -> None:
    _Worker.preparation.do(portion, _Worker.preparer, _Worker.watch)


def do_portions(preparation: Preparation, portions: Sequence[Portion], workers: int, console: Console) -> int:
    """Prepare portions on ``workers`` processes (one: this one); return the number of video frames read.

    Raises:
        UserError: MediaPipe is missing, or a worker was killed. What is done is kept.
    """
    clips = sum(len(portion.clips) for portion in portions)
    with progress(console, preparation.out.name, clips, unit="clips") as shown:
        if workers > 1:
            return _do_in_workers(preparation, portions, workers, shown.update)
        preparer, watch = ClipPreparer(preparation.settings), _LocalWatch(shown.advance)
        for portion in portions:
            preparation.do(portion, preparer, watch)
        return watch.frames


def _do_in_workers(
    preparation: Preparation, portions: Sequence[Portion], workers: int, show: Callable[[int], None]
) -> int:
    # Spawned: the caller may have threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 2)
    with tempfile.TemporaryDirectory(prefix="mome-prepare-") as scratch:
        folder = Path(scratch)
        pool = ProcessPoolExecutor(min(workers, len(portions)), context, _start_worker, (preparation, counts, folder))
        waiting: set[Future[None]] = set()
        try:
            waiting |= {pool.submit(_do, portion) for portion in portions}
            while waiting:
                done, waiting = wait(waiting, _REFRESH_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                show(counts[0])
        except BrokenProcessPool as error:
            pool.shutdown()  # all workers have ended; only those that crashed have left a file
            clips = ", ".join(path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()))
            raise UserError(
                f"a worker process was killed, perhaps for want of memory, at {clips or 'no clip'}: run the same "
                "command again, which goes on from here, with fewer --workers; if it dies at the same clip again, take "
                "that clip away"
            ) from error
        finally:
            if waiting:  # what they do is of no use any more
                for process in multiprocessing.active_children():
                    process.kill()
            pool.shutdown(cancel_futures=True)
    return int(counts[1])
