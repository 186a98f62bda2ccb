"""The most memory that a piece of work took: on GPUs what torch gave out, on a CPU what the process had in memory."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): sets the peak of the resident size to its present value


def reset_peak(device: torch.device) -> None:
    """Start to look for the highest value; on a CPU the kernel must allow it, otherwise nothing happens."""
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(number)
    elif _CLEAR.exists():
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            return  # the peak is then that of the whole process so far, which is an upper bound


def peak_bytes(device: torch.device) -> int | None:
    """The highest value since `reset_peak`, of all GPUs of this process together; None where the system has no answer.

    On a CPU this is the resident size of the whole process, with its libraries and the frozen models.
    """
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    return None if found is None else int(found[1]) * 1024
