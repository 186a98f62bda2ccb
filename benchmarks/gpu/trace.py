"""What a device did and when, from the trace of torch's profiler: kernels, launches, and why nothing ran in between.

On a CPU the innermost operations stand for kernels, so that a rehearsal reads traces, too.
Source of the trace's fields: https://github.com/pytorch/kineto/blob/main/libkineto/README.md
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
MICROSECOND = 1e-6


@dataclass(frozen=True)
class Kernel:
    """A kernel or copy on a GPU; times in microseconds.

    Attributes:
        name: as the trace has it.
        start, end: on the device.
        asked: when the host began to launch it; None where that is unknown.
    """

    name: str
    start: float
    end: float
    asked: float | None = None


@dataclass(frozen=True)
class Trace:
    """All kernels of a piece of work, in order of their start."""

    kernels: tuple[Kernel, ...]

    @property
    def span(self) -> float:
        """Seconds from the first kernel's start to the last one's end."""
        return (max(kernel.end for kernel in self.kernels) - self.kernels[0].start) * MICROSECOND

    @property
    def busy(self) -> float:
        """Seconds in which at least one kernel ran."""
        return self.span - sum(end - start for start, end, _ in self._gaps()) * MICROSECOND

    @property
    def idle_share(self) -> float:
        """Part of the span in which nothing ran."""
        return 1 - self.busy / self.span

    @property
    def host_share(self) -> float:
        """Part of the span in which nothing ran because the next kernel was not asked for yet."""
        late = sum(
            min(following.asked, end) - start
            for start, end, following in self._gaps()
            if following.asked is not None and following.asked > start
        )
        return late * MICROSECOND / self.span

    def by_name(self) -> dict[str, list[float]]:
        """Seconds of every kernel by its name, the name that takes most first."""
        seconds: dict[str, list[float]] = defaultdict(list)
        for kernel in self.kernels:
            seconds[kernel.name].append((kernel.end - kernel.start) * MICROSECOND)
        return dict(sorted(seconds.items(), key=lambda each: -sum(each[1])))

    def _gaps(self) -> list[tuple[float, float, Kernel]]:
        """(start, end, the kernel that ends it) of every time in which nothing ran."""
        gaps, until = [], self.kernels[0].start
        for kernel in self.kernels:
            if kernel.start > until:
                gaps.append((until, kernel.start, kernel))
            until = max(until, kernel.end)
        return gaps


def traced(run: Callable[[], object], device: torch.device, keep: Path | None = None) -> Trace:
    """Run something that has been warmed up, and trace it.

    Args:
        keep: where the whole trace is written, for chrome://tracing or https://ui.perfetto.dev.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    # Watching every operation of the host would slow it down, and it is what is judged.
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return gpu_trace(events) if on_gpu else cpu_trace(events)


def gpu_trace(events: Iterable[Mapping[str, Any]]) -> Trace:
    """The kernels of a GPU among the events of a trace; a call of the host has the same correlation."""
    complete = [event for event in events if event.get("ph") == "X"]
    asked = {
        event["args"]["correlation"]: float(event["ts"])
        for event in complete
        if event.get("cat") in CALLS and "correlation" in event.get("args", {})
    }
    kernels = [
        Kernel(
            event["name"],
            float(event["ts"]),
            float(event["ts"]) + float(event["dur"]),
            asked.get(event.get("args", {}).get("correlation")),
        )
        for event in complete
        if event.get("cat") in ON_DEVICE
    ]
    return _in_order(kernels)


def cpu_trace(events: Iterable[Mapping[str, Any]]) -> Trace:
    """The operations among the events of a trace that call no other."""
    operations: dict[Any, list[Kernel]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            start = float(event["ts"])
            operations[event["tid"]].append(Kernel(event["name"], start, start + float(event["dur"])))
    innermost = []
    for mine in operations.values():
        mine.sort(key=lambda kernel: (kernel.start, -kernel.end))
        calls_none = [one.end <= after.start for one, after in pairwise(mine)]
        innermost += [one for one, alone in zip(mine, [*calls_none, True], strict=True) if alone]
    return _in_order(innermost)


def _in_order(kernels: list[Kernel]) -> Trace:
    assert kernels, "nothing ran on the device"
    return Trace(tuple(sorted(kernels, key=lambda kernel: kernel.start)))
