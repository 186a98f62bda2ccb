"""How often the host waits for the device.

A GPU says so itself (`torch.cuda.set_sync_debug_mode`). On a CPU, where nobody waits, what would wait is counted: reads
of single values, results whose size the host must know, and tensors that are copied to the host or made from its
numbers. What waits inside a library (a collective, ``torch.cuda.synchronize``) is in neither count.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# The host needs these operations' results, or the number of elements in them.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount"}
_INDEXING = {"index", "index_put", "index_put_"}  # which look for what is True in a mask
# Calls that reach no operation on a CPU, for there is nothing to copy there.
_COPYING = {"tolist", "cpu", "numpy", "tensor", "as_tensor"}


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _WAITING or (name in _INDEXING and _looks_for_true(*args)):
            self._counts[name] += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _COPYING:
            self._counts[name] += 1
        return func(*args, **(kwargs or {}))


def _looks_for_true(_tensor: Any, indices: Any, value: Any = None, *_: Any) -> bool:
    """Whether an index is a mask; where one number is written, it is used as it is."""
    masks = [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and (value is None or value.numel() > 1)


@contextmanager
def _on_a_cpu(counts: Counter[str]) -> Iterator[None]:
    with _Calls(counts), _Operations(counts):
        yield


@contextmanager
def _on_a_gpu(counts: Counter[str]) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            counts[f"{warning.filename.rpartition('/')[2]}:{warning.lineno}"] += 1


def waits(device: torch.device, run: Callable[[], object]) -> Counter[str]:
    """Waits of the host while ``run`` runs: by operation on a CPU, by line of code on a GPU."""
    counts: Counter[str] = Counter()
    with _on_a_cpu(counts) if device.type == "cpu" else _on_a_gpu(counts):
        run()
    return counts
