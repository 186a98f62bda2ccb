"""Counting the operations that PyTorch is asked for: on a GPU, most of them are kernels."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# What only looks at memory in another way, asks for some, or reads a number on the host.
_NO_KERNEL = {
    *("view", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute", "expand", "slice", "select", "split"),
    *("split_with_sizes", "unbind", "unsqueeze", "squeeze", "unfold", "detach", "alias", "as_strided", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense"),
}


class Operations(TorchDispatchMode):
    """Counts what would be a kernel, while it is entered, in the backward pass too.

    Attributes:
        count: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ not in _NO_KERNEL
        return function(*args, **(kwargs or {}))
