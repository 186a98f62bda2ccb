"""What the C library does with freed memory."""

from __future__ import annotations

import torch

# The largest block that raises glibc's thresholds (mallopt(3), M_MMAP_THRESHOLD: 32 MiB), with room for its header.
LARGEST_BLOCK = (32 << 20) - 8192


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory of up to 64 MiB instead of giving it back to the kernel.

    What it keeps is twice the largest block that was ever freed. Activations of a few megabytes would go back after
    every layer and come again page by page, zeroed, which takes longer than the arithmetic of a MoME layer. Freeing one
    large block, that nobody touches, settles it for the process; other C libraries are not moved by it.
    """
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8)
