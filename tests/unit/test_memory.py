"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
from mome_dist.parallel.memory import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1])

if sys.argv[1] == "kept":
    keep_freed_memory()
blocks = [torch.ones(1 << 20) for _ in range(6)]  # 4 MiB each
full = resident()
del blocks
print((full - resident()) * 4096 >> 20)
"""


@pytest.mark.parametrize("kept", [True, False])
def test_freed_blocks_go_back_to_the_kernel_unless_kept(kept: bool) -> None:
    command = [sys.executable, "-c", PROGRAM, "kept" if kept else "as it comes"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    returned = int(done.stdout)  # MiB of 24
    assert returned < 4 if kept else returned > 16
