"""Faults that happen to a rank from inside, at a place that the training loop reports."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mome_dist.training import loop

FORWARD, SAVING = "forward and backward", "saving"
NOT_FINITE, FILE_LIMIT = "not finite", "file limit"
FILE_LIMIT_BYTES = 64 << 10  # enough for logs, too little for a checkpoint
FAULT, READY = "fault", "ready"  # files with the time of the first fault and of the first step of a start


@dataclass(frozen=True)
class Injection:
    """One fault.

    Attributes:
        kind: name of a signal, `NOT_FINITE` (a gradient) or `FILE_LIMIT` (as on a full disk).
        rank: that it happens to.
        step: optimiser steps done by then; None for the first time at the place.
        place: as the loop reports it.
        delay: seconds after the rank came to the place.
    """

    kind: str
    rank: int
    step: int | None
    place: str = FORWARD
    delay: float = 0.0


def install(injections: Sequence[Injection], notes: Path) -> None:
    """Make the faults happen in this process, and note in a folder when; call it before training starts."""
    rank = int(os.environ["RANK"])
    waiting = [injection for injection in injections if injection.rank == rank]
    report, forward_backward = loop.report, loop.forward_backward
    spoil = False

    def reported(place: str, step: int | None = None, patient: bool = False) -> None:
        nonlocal spoil
        report(place, step, patient)
        if rank == 0 and not (notes / READY).exists():
            (notes / READY).write_text(str(time.time()))
        for injection in [each for each in waiting if each.place == place and each.step in (None, step)]:
            waiting.remove(injection)
            if injection.kind == NOT_FINITE:
                spoil = True
            elif injection.delay:
                threading.Timer(injection.delay, _happen, (injection, notes)).start()
            else:
                _happen(injection, notes)

    def spoiled(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal spoil
        result = forward_backward(model, *args, **kwargs)
        if spoil:
            _note(notes)
            gradients = (p.grad for p in model.trainable_modules().parameters() if p.grad is not None)
            next(gradients).view(-1)[0] = torch.nan
            spoil = False
        return result

    loop.report, loop.forward_backward = reported, spoiled


def _happen(injection: Injection, notes: Path) -> None:
    _note(notes)
    if injection.kind == FILE_LIMIT:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    else:
        os.kill(os.getpid(), signal.Signals[injection.kind])


def _note(notes: Path) -> None:
    if not (notes / FAULT).exists():
        (notes / FAULT).write_text(str(time.time()))
