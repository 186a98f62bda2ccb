"""Portions over processes, with a bar that tells when they will be done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from multiprocessing.sharedctypes import SynchronizedArray

import cv2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mome_dist.data.preparation.portions import Portion, Preparation
from mome_dist.data.preparation.utterances import ClipPreparer
from mome_dist.errors import UserError

_REFRESH_SECONDS = 0.5


class _Worker:
    """State of a worker process."""

    preparation: Preparation
    preparer: ClipPreparer
    counts: SynchronizedArray[int]  # clips and frames so far, of all workers


def _start_worker(preparation: Preparation, counts: SynchronizedArray[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    cv2.setNumThreads(1)
    _Worker.preparation, _Worker.counts = preparation, counts
    _Worker.preparer = ClipPreparer(preparation.settings)


def _die_with(sentinel: int) -> None:
    """End this process when its parent is gone: nobody would wait for what it does."""
    wait_for_end([sentinel])
    os._exit(1)


def _tick(clips: int, frames: int) -> None:
    counts = _Worker.counts
    with counts.get_lock():
        counts[0] += clips
        counts[1] += frames


def _do(portion: Portion) -> None:
    _Worker.preparation.do(portion, _Worker.preparer, _tick)


def do_portions(preparation: Preparation, portions: Sequence[Portion], workers: int, console: Console) -> int:
    """Prepare portions on ``workers`` processes (one: this one); return the number of video frames read.

    Raises:
        UserError: MediaPipe is missing, or a worker was killed. What is done is kept.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("clips"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(preparation.out.name), *columns, console=console) as progress:
        bar = progress.add_task("", total=sum(len(portion.clips) for portion in portions))
        if workers > 1:
            return _do_in_workers(preparation, portions, workers, lambda clips: progress.update(bar, completed=clips))
        preparer, read = ClipPreparer(preparation.settings), 0

        def tick(clips: int, frames: int) -> None:
            nonlocal read
            read += frames
            progress.advance(bar, clips)

        for portion in portions:
            preparation.do(portion, preparer, tick)
        return read


def _do_in_workers(
    preparation: Preparation, portions: Sequence[Portion], workers: int, show: Callable[[int], None]
) -> int:
    # Spawned: the caller may have threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 2)
    pool = ProcessPoolExecutor(min(workers, len(portions)), context, _start_worker, (preparation, counts))
    waiting: set[Future[None]] = set()
    try:
        waiting |= {pool.submit(_do, portion) for portion in portions}
        while waiting:
            done, waiting = wait(waiting, _REFRESH_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()
            show(counts[0])
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for want of memory: run the same command again, which goes on from "
            "here, with fewer --workers if it happens again"
        ) from error
    finally:
        if waiting:  # what they do is of no use any more
            for process in multiprocessing.active_children():
                process.kill()
        pool.shutdown(cancel_futures=True)
    return int(counts[1])
