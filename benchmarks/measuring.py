"""How everything here is timed: candidates take turns, all in the same processes, and the slowest rank counts.

On a GPU, CUDA events tell when its work began and ended, and the host's clock how long Python took to ask for it. On a
CPU both are the same.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mome_dist.launchers.environment import usable_cores
from mome_dist.versions import version_of

WARM_UP_ROUNDS = 2
CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Timing(NamedTuple):
    """Seconds of a piece of work.

    Attributes:
        device: until its last operation had ended.
        host: until the last one was asked for.
    """

    device: float
    host: float


class Stopwatch:
    """Marks between the parts of one piece of work."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._host, self._events = device, list[float](), list[torch.cuda.Event]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.mark()

    def mark(self) -> None:
        """Begin the next part; the first one has begun already."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        self._host.append(time.perf_counter())

    def parts(self) -> list[Timing]:
        """Each part between two marks; waits for the last one."""
        host = [after - before for before, after in pairwise(self._host)]
        if self._device.type != "cuda":
            return [Timing(seconds, seconds) for seconds in host]
        self._events[-1].synchronize()
        device = [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._events)]
        return [Timing(*both) for both in zip(device, host, strict=True)]


def total(parts: Iterable[Timing]) -> Timing:
    """Parts that follow each other, as one."""
    return Timing(*(sum(each) for each in zip(*parts, strict=True)))


def meet() -> None:
    """Wait for the other ranks of the world, if there are any."""
    if _ranks() > 1:
        dist.barrier()


def slowest(parts: list[Timing]) -> list[Timing]:
    """The most that any rank took for each part."""
    if _ranks() == 1:
        return parts
    seconds = torch.tensor(parts, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return [Timing(*each) for each in seconds.tolist()]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device = CPU,
    warm_up: int = WARM_UP_ROUNDS,
) -> dict[str, list[Timing]]:
    """What each candidate takes in each round (A B C, A B C, ...), on the slowest rank; first rounds do not count.

    Every rank of the world calls it with the same candidates.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in candidates}
    for turn in range(warm_up + rounds):
        for name, run in candidates.items():
            meet()
            watch = Stopwatch(device)
            run()
            watch.mark()
            (timing,) = slowest(watch.parts())
            if turn >= warm_up:
                timings[name].append(timing)
    return timings


def median_milliseconds(seconds: Iterable[float]) -> float:
    """The middle one of some rounds."""
    return statistics.median(seconds) * 1e3


class WireBytes:
    """Bytes that one rank sends to others, from the tensors of the collectives that run inside `counted`.

    Of R ranks, an all-to-all of equal parts and a reduce-scatter send (R - 1) / R of their input, one of unequal parts
    all but this rank's own, an all-gather sends its input to R - 1 others, and an all-reduce is a reduce-scatter and an
    all-gather.
    """

    def __init__(self) -> None:
        self.sent = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the collectives of `torch.distributed`, by whomever they are called."""
        shares: dict[str, tuple[int, Callable[[int], float]]] = {
            # name: position of the input among the arguments, parts of it that are sent
            "all_to_all_single": (1, lambda ranks: (ranks - 1) / ranks),
            "all_gather_into_tensor": (1, lambda ranks: ranks - 1),
            "reduce_scatter_tensor": (1, lambda ranks: (ranks - 1) / ranks),
            "all_reduce": (0, lambda ranks: 2 * (ranks - 1) / ranks),
        }
        originals = {name: getattr(dist, name) for name in shares}
        for name, (position, share) in shares.items():
            setattr(dist, name, self._counting(originals[name], position, share))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def _counting(
        self, collective: Callable[..., Any], position: int, share: Callable[[int], float]
    ) -> Callable[..., Any]:
        def counting(*tensors: Any, **arguments: Any) -> Any:
            named = [arguments[name] for name in ("input", "input_tensor", "tensor") if name in arguments]
            source = named[0] if named else tensors[position]
            group = arguments.get("group")
            sent = share(dist.get_world_size(group))
            parts = tensors[3] if len(tensors) > 3 else None  # rows for each rank, of an all-to-all
            if parts and sum(parts):
                sent = 1 - parts[dist.get_rank(group)] / sum(parts)
            self.sent += sent * source.numel() * source.element_size()
            return collective(*tensors, **arguments)

        return counting


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What was measured on, in words."""
    return {
        **(_gpu(device) if device.type == "cuda" else {}),
        "processor": _processor(),
        "cores": usable_cores(),
        "threads of a process": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version_of("torch"),
        "deepspeed": version_of("deepspeed"),
        "megatron-core": version_of("megatron-core"),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    """The GPU with its driver, and what kernels come from."""
    properties = torch.cuda.get_device_properties(device)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    told = subprocess.run(asked, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    return {
        "GPU": properties.name,
        "GPU memory, GB": round(properties.total_memory / 1e9, 1),
        "driver": told.stdout.strip() if told and told.returncode == 0 else "unknown",
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "triton": version_of("triton"),
        "transformers": version_of("transformers"),
    }


def _processor() -> str:
    """The processor's model name and, where it has them, its bf16 instructions."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    name = fields.get("model name", platform.processor() or platform.machine())
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return f"{name} ({', '.join(bf16) or 'no bf16 products'})"
