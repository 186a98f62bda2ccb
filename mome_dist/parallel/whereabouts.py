"""Who keeps the others waiting: every rank says where it is, and a failed collective is answered with a name.

Each rank writes its step, its place in the step and a heartbeat into the rendezvous store: one write of about 10 us for
a place, one a second for the heartbeat. When a collective fails or times out, the ranks that notice look the others up
for a few seconds and stop with one line. In this order they blame: ranks that stopped with an error of their own, ranks
whose heart no longer beats (killed, stopped, their host lost), and ranks that beat but have been to fewer places.

gloo raises an error in the waiting rank. NCCL does not: its watchdog thread ends the process at the timeout
(``TORCH_NCCL_ASYNC_ERROR_HANDLING``, which stays as it is: after an aborted collective the GPU's data are not to be
trusted). So the heartbeat also watches its own rank. One that has been at a place for the timeout looks the others up
and ends the process with the same line; a place is entered before its collectives start, so this comes before NCCL. And
the first rank that stops leaves a note in the store, by which the others end within seconds wherever they wait.

A rank that fails on NCCL says why and leaves its process with the groups open: closing them waits for kernels that
never finish.

What may take longer than a collective (hashing a large model, encoding a corpus) is waited for in the store with
`wait_for_all`, never inside of a collective.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta

import torch.distributed as dist

from mome_dist.cli import main_guard
from mome_dist.errors import PreemptedError, RankLostError, UserError
from mome_dist.parallel.rendezvous import STORE_SECONDS, ask, open_store
from mome_dist.parallel.sighting import ENDED, OWN_ERROR, USER_ERROR, VICTIM, Sighting

BEAT_SECONDS = 1.0
OBSERVE_SECONDS = 3.5  # three heartbeats are missed before a rank counts as silent
LINGER_SECONDS = 20.0  # rank 0 keeps the store open for others that are still looking
GLOO_SLACK_SECONDS = 15.0  # gloo's own error should come first
TOLD_SECONDS = 3.0  # a rank may take to notice by itself that another one has stopped
SILENT_SECONDS = 15.0  # without a heartbeat or an answer: long work may starve the thread that beats or serves
POLL_SECONDS = (0.002, 1.0)  # first and longest pause while waiting for all
NAMED_RANKS = 8  # in one message

_BROKEN = "whereabouts/broken"  # the key that the first rank to stop sets


class Whereabouts:
    """One rank's reports, heartbeat and judgement. Made by `watched`; needs a default process group of several ranks.

    Args:
        timeout_seconds: of every collective.
        limit_seconds: how long a rank may stay at one place before its own heartbeat ends it.
    """

    def __init__(self, timeout_seconds: float, limit_seconds: float) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._timeout, self._limit = timeout_seconds, limit_seconds
        self._serving = dist.distributed_c10d._get_default_store()  # must outlive the process groups
        # Ranks of a busy machine may be long in connecting. That one of them is lost is told by those that wait for it.
        self._connecting = max(timeout_seconds, SILENT_SECONDS)
        self._store = open_store(self._connecting)
        self._listening = open_store(self._connecting)  # of the heart: a question may never be answered
        for store in (self._store, self._listening):
            store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._mine = Sighting(socket.gethostname(), None, "starting", time.time())
        self._unheard = replace(self._mine, host="host not known yet")  # of a rank that has said nothing
        self._entered, self._patient = time.monotonic(), True
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._named: set[int] = set()
        self._judging, self._waits = False, 0
        self._meetings: Counter[str] = Counter()
        self._say()
        self._heart = threading.Thread(target=self._beat, name="whereabouts", daemon=True)
        self._heart.start()

    def report(self, place: str, step: int | None, patient: bool) -> None:
        """Say where this rank is now."""
        with self._lock:
            visits = self._mine.visits + 1
            self._mine = replace(self._mine, step=step, place=place, since=time.time(), visits=visits)
            self._entered, self._patient = time.monotonic(), patient
            self._say()

    def wait_for_all(self, what: str, group: dist.ProcessGroup | None) -> None:
        """Wait until every rank has come here; see the function of this name."""
        keys = [f"whereabouts/{what}/{self._meetings[what]}/{rank}" for rank in range(self._size)]
        self._meetings[what] += 1
        pause, looked, heard = POLL_SECONDS[0], 0.0, [(-1, 0.0)] * self._size
        answered = time.monotonic()
        with self._patiently():
            store = open_store(self._connecting)
            with self._lock:
                self._store.set(keys[self._rank], "")
            while True:
                answer = ask(lambda s: (s.check(keys), s.check([_BROKEN])), store)
                # A busy machine answers late; a store that has not answered for long is gone.
                answered = answered if answer is None else time.monotonic()
                all_here, broken = answer or (False, time.monotonic() - answered > SILENT_SECONDS)
                if all_here:
                    break
                if answer and time.monotonic() - looked > SILENT_SECONDS / 3 and (seen := self._look_up(store)):
                    looked = time.monotonic()
                    # The heartbeats of each rank, and since when there are no more.
                    heard = [
                        (s.beats, since if s.beats == beats else looked)
                        for s, (beats, since) in zip(seen, heard, strict=True)
                    ]
                    broken |= any(looked - since > SILENT_SECONDS for _, since in heard)
                if broken:
                    raise dist.DistError(f"not all ranks came to: {what}")
                time.sleep(pause)
                pause = min(2 * pause, POLL_SECONDS[1])
            # Now none is late, and rank 0 does not leave with the store while others still look.
            dist.barrier(group)

    @contextmanager
    def _patiently(self) -> Iterator[None]:
        """Not stuck while this lasts, which is no part of the time at the place."""
        with self._lock:
            self._waits += 1
        try:
            yield
        finally:
            with self._lock:
                self._waits -= 1
                self._entered = time.monotonic()

    def judge(self, error: BaseException) -> BaseException:
        """Tell the others that this rank stops; return what to raise instead of ``error``, or ``error`` itself.

        A failed collective becomes a `RankLostError` that names who is behind it, or the `UserError` that stopped it.
        """
        if not self._claim():
            self._heart.join()  # which ends the process
        if isinstance(error, RankLostError) or not _is_of_collective(error):
            kind = USER_ERROR if isinstance(error, UserError) else OWN_ERROR
            self._end(kind, str(error) if kind == USER_ERROR else f"{type(error).__name__}: {error}")
            return error
        verdict = self._look_around(str(error))
        self._end(VICTIM, str(verdict))
        return verdict

    def close(self, failed: bool) -> None:
        """Stop the heartbeat. On rank 0 after a failure, first let the others look around in the store."""
        if not failed:
            self._end(ENDED, "")
        else:
            self._linger()
        self._closed.set()
        self._heart.join(BEAT_SECONDS)

    def _linger(self) -> None:
        """On rank 0, with which the store goes: let the others look around in it."""
        deadline = time.monotonic() + LINGER_SECONDS
        while self._rank == 0 and time.monotonic() < deadline:
            seen = self._look_up()
            # Who is named may not come to look.
            if seen is None or all(s.fate or rank in self._named for rank, s in enumerate(seen)):
                break
            time.sleep(0.1)

    def _say(self) -> None:
        self._store.set(f"whereabouts/{self._rank}", json.dumps(asdict(self._mine)))

    def _end(self, fate: str, reason: str) -> None:
        with self._lock:
            self._mine = replace(self._mine, fate=fate, reason=reason)
            self._patient = True
            self._say_if_possible(broken=fate != ENDED)

    def _say_if_possible(self, broken: bool = False) -> bool:
        try:
            self._say()
            if broken:
                self._store.set(_BROKEN, str(self._rank))
        except dist.DistError:
            # The store went with rank 0. Whoever waits for rank 0 in a collective finds out.
            return False
        return True

    def _claim(self) -> bool:
        """Whether the caller is the first thread to judge: the main one, or the heart."""
        with self._lock:
            first, self._judging = not self._judging, True
        return first

    def _beat(self) -> None:
        broken = 0.0  # when this rank was told that another one has stopped
        while not self._closed.wait(BEAT_SECONDS):
            with self._lock:
                self._mine = replace(self._mine, beats=self._mine.beats + 1)
                reachable = self._say_if_possible()
                patient = self._patient or self._waits
                stuck = not patient and time.monotonic() - self._entered > self._limit
            if reachable and not broken and ask(lambda store: store.check([_BROKEN]), self._listening):
                broken = time.monotonic()
            late = broken and time.monotonic() - broken > TOLD_SECONDS
            if (stuck or late) and not self._closed.is_set() and self._claim():
                # The main thread is inside a collective, or at work for nothing, and cannot be interrupted.
                verdict = self._look_around("no progress")
                self._end(VICTIM, str(verdict))
                code = last_words(verdict)
                self._linger()
                os._exit(code)

    def _look_around(self, symptom: str) -> Exception:
        """Watch the other ranks for a few heartbeats and name whoever is behind."""
        waited = time.monotonic() - self._entered
        began, first, seen = time.monotonic(), self._look_up(), None
        while first is not None:
            seen = self._look_up()
            if seen is None or any(sighting.fate in (OWN_ERROR, USER_ERROR) for sighting in seen):
                break
            if time.monotonic() - began > OBSERVE_SECONDS:
                break
            time.sleep(0.2)
        me = f"Rank {self._rank} ({self._mine.host}) waited {waited:.1f} s {self._mine.where()}"
        if first is None or seen is None:
            return RankLostError(
                f"rank 0's process, or its host {os.environ['MASTER_ADDR']}, is gone or hangs: the rendezvous store "
                f"there does not answer. {me}. {_ADVICE}"
            )
        for rank, sighting in enumerate(seen):
            if sighting.fate == USER_ERROR:
                return UserError(f"rank {rank} ({sighting.host}): {sighting.reason}")
        silent_ranks = [
            rank
            for rank, (sighting, before) in enumerate(zip(seen, first, strict=True))
            if rank != self._rank and sighting.fate is None and sighting.beats == before.beats
        ]
        stopped = [(r, f"stopped: {s.reason};") for r, s in enumerate(seen) if s.fate == OWN_ERROR]
        silent = [(r, "is silent:") for r in silent_ranks]
        behind, last = self._behind(seen), seen
        if not (stopped or silent or behind):
            # Who kept the others waiting may have come since, too late for them.
            behind, seen = self._behind(first), first
        blamed = stopped or silent or behind
        self._named = {rank for rank, _ in blamed}
        causes = [f"rank {rank} ({seen[rank].host}) {what} {seen[rank].where()}" for rank, what in blamed]
        victims = [sighting.reason for sighting in last if sighting.fate == VICTIM]
        if not causes and victims:
            return RankLostError(victims[0])
        if not causes:
            return RankLostError(
                f"every rank is alive and as far as this one or further, but: {symptom}. This rank itself hangs, the "
                f"network is slow or broken, or ranks wait in different collectives. {me}. {_ADVICE}"
            )
        named = "; ".join(causes[:NAMED_RANKS]) + (
            f"; and {len(causes) - NAMED_RANKS} more" if len(causes) > NAMED_RANKS else ""
        )
        return RankLostError(f"{named}. {me}; parallel.timeout_seconds={self._timeout:g}. {_ADVICE}")

    def _behind(self, seen: list[Sighting]) -> list[tuple[int, str]]:
        """Ranks that run, and had been to fewer places than this one."""
        fewer = [r for r, s in enumerate(seen) if s.fate is None and s.visits < self._mine.visits]
        return [(rank, "is behind:") for rank in fewer]

    def _look_up(self, store: dist.TCPStore | None = None) -> list[Sighting] | None:
        """What every rank last said, in rank order; None if the store does not answer."""
        keys = [f"whereabouts/{rank}" for rank in range(self._size)]

        def read(store: dist.TCPStore) -> dict[str, bytes]:
            said = keys if store.check(keys) else [key for key in keys if store.check([key])]
            return dict(zip(said, store.multi_get(said), strict=True))

        # Whoever is not named in time may be slow; whoever is named wrongly sends somebody to the wrong machine.
        texts = ask(read, store, SILENT_SECONDS)
        if texts is None:
            return None
        return [Sighting(**json.loads(texts[key])) if key in texts else self._unheard for key in keys]


_ADVICE = (
    "Look at the log and host of the rank that is named; start the run again to continue from its newest checkpoint. "
    "If it was only slow, raise parallel.timeout_seconds."
)
_current: Whereabouts | None = None


@contextmanager
def watched(timeout_seconds: float, close: Callable[[], None]) -> Iterator[None]:
    """Watch over the ranks of the default process group inside the block; every rank enters it.

    Args:
        timeout_seconds: of every collective.
        close: closes the process groups; called on the way out.

    On NCCL an error does not leave the block: its message or traceback is printed, and the process ends with the exit
    code that it stands for, the process groups open.

    Raises:
        RankLostError: instead of the error of a collective that failed because of another rank; it names the rank.
        UserError: if the other rank stopped with one.
    """
    global _current
    if dist.get_world_size() == 1:
        try:
            yield
        finally:
            close()
        return
    nccl = _on_nccl()
    here = _current = Whereabouts(timeout_seconds, timeout_seconds + (0 if nccl else GLOO_SLACK_SECONDS))
    failed = True
    try:
        try:
            yield
            failed = False
        except PreemptedError:
            failed = False  # no rank has anything under way
            raise
        except (Exception, KeyboardInterrupt) as error:
            verdict = here.judge(error)
            if nccl:
                code = last_words(verdict)
                here.close(failed)
                os._exit(code)
            if verdict is error:
                raise
            raise verdict from error
        finally:
            close()
    finally:
        _current = None
        here.close(failed)


def report(place: str, step: int | None = None, patient: bool = False) -> None:
    """Say what this rank does from now on, for the others to read when they wait for it.

    Args:
        place: such as "reading the batch"; all ranks of a world report the same places in the same order.
        step: optimiser steps done.
        patient: the place may take longer than the timeout of a collective.
    """
    if _current is not None:
        _current.report(place, step, patient)


def wait_for_all(what: str, group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank of the world has come here, for as long as the slowest one works.

    For what may take longer than the timeout of a collective, which would end the run: the ranks count themselves in
    the store, and the barrier comes when all are there. A rank that stops or dies is noticed within seconds.

    Args:
        what: the others do, such as "hashing the frozen models"; the same on all ranks, which wait for the same things
            in the same order. A thread beside the main one needs names of its own, and a group.
        group: of all ranks, for the barrier; by default, the default one.

    Raises:
        torch.distributed.DistError: if a rank is gone; leaving `watched`, it becomes an error that names the rank.
    """
    if _current is not None:
        _current.wait_for_all(what, group)


def last_words(error: BaseException) -> int:
    """Print of an error what `mome_dist.cli.main_guard` and Python would; return the exit code of the process."""

    @main_guard
    def tell() -> None:
        raise error

    try:
        return tell()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _on_nccl() -> bool:
    return str(dist.get_backend()) == dist.Backend.NCCL


def _is_of_collective(error: BaseException) -> bool:
    """Whether an error comes from communication. gloo raises plain RuntimeErrors that name its source files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
