"""CUDA graphs rehearsed on any device: what was done at the capture is done again, operation by operation.

At the capture every operation is written down with the tensors that it had. A replay runs no Python of the function: it
does those operations again, on the same tensors, and writes the results where the first ones were. So whatever a graph
would not see (another number from the host, a tensor that was made elsewhere) is not seen here either, and memory that
nobody wrote holds NaN. What a graph cannot do at all is refused at the capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mome_dist.cuda_graphs.replay import Function

_UNWRITTEN = {"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like"}
_INDEXING = {"index", "index_put", "index_put_"}
_COPYING = {"tolist", "cpu", "numpy", "tensor", "as_tensor", "from_numpy"}


class RehearsedGraphs:
    """A `mome_dist.cuda_graphs.replay.Graphs`, to the letter of `torch.cuda.make_graphed_callables`."""

    def __call__(self, function: Function, samples: tuple[Tensor, ...]) -> Function:
        wanted = [each for each in samples if each.requires_grad]
        _backward(function(*samples), wanted)  # warm-up: what is only done once is not in a graph
        with _NoCopies(), _Tape() as forward:
            outputs = function(*samples)
        gradients = [torch.zeros_like(each) if each.requires_grad else None for each in outputs]
        with _NoCopies(), _Tape() as backward:
            found = iter(_backward(outputs, wanted, gradients))
        inner = [next(found) if each.requires_grad else None for each in samples]
        fixed = [each.detach() for each in outputs]

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
                for buffer, given in zip(samples, inputs, strict=True):
                    if buffer.data_ptr() != given.data_ptr():
                        buffer.copy_(given)
                forward.replay()
                return tuple(each.detach() for each in fixed)

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
                for buffer, gradient in zip(gradients, given, strict=True):
                    if buffer is not None:
                        buffer.copy_(gradient)
                backward.replay()
                return tuple(None if each is None else each.detach() for each in inner)

        return lambda *inputs: Graphed.apply(*inputs)


def _backward(
    outputs: tuple[Tensor, ...], wanted: list[Tensor], gradients: list[Tensor | None] | None = None
) -> list[Tensor | None]:
    if gradients is None:
        gradients = [torch.zeros_like(each) if each.requires_grad else None for each in outputs]
    ends = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
    if not ends:
        return [None] * len(wanted)
    return list(torch.autograd.grad([o for o, _ in ends], wanted, [g for _, g in ends], allow_unused=True))


class _Written(NamedTuple):
    """An operation, its arguments, and what it gave beside views of these and what it wrote to."""

    operation: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor | None]


class _NoCopies(TorchFunctionMode):
    """Refuses copies between the host and the device, which on a CPU are no operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in _COPYING:
            raise RuntimeError(f"{name} copies between host and device: no CUDA graph can")
        return func(*args, **(kwargs or {}))


class _Tape(TorchDispatchMode):
    """Writes down what is done inside."""

    def __init__(self) -> None:
        super().__init__()
        self._written: list[_Written] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if problem := _problem(func, args):
            raise RuntimeError(f"{func} {problem}: no CUDA graph can")
        found = func(*args, **kwargs)
        held = {_memory(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        results = [
            each if isinstance(each, Tensor) and each.numel() and _memory(each) not in held else None
            for each in tree_leaves(found)
        ]
        if func._schema.is_mutable or any(each is not None for each in results):
            self._written.append(_Written(func, args, kwargs, results))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, results in self._written:
            if getattr(operation, "overloadpacket").__name__ in _UNWRITTEN:  # noqa: B009
                for each in results:
                    if each is not None and each.is_floating_point():
                        each.fill_(torch.nan)
                continue
            for each, again in zip(results, tree_leaves(operation(*args, **kwargs)), strict=True):
                if each is not None:
                    each.copy_(again)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _problem(func: Any, args: tuple[Any, ...]) -> str:
    """What an operation does that the host would have to wait for."""
    name = func.overloadpacket.__name__
    if name in _INDEXING:
        masks = [each for each in args[1] if each is not None and each.dtype in (torch.bool, torch.uint8)]
        return "looks for what is true in a mask" if masks else ""
    if torch.Tag.data_dependent_output in func.tags:
        return "gives the host a value"
    return "gives as many elements as values say" if torch.Tag.dynamic_output_shape in func.tags else ""
