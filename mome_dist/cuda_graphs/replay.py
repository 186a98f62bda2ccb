"""A function of tensors as a CUDA graph forward and one backward, and the rules that such graphs need kept.

A graph does on every replay what was done at its capture: the same kernels, on the same addresses, with every number
that the host gave at the time. So inputs are copied into fixed buffers, shapes never change, and parameters stay where
they are. Capture and replay are torch's own, or on any device their rehearsal (`mome_dist.cuda_graphs.kinds`); what
surrounds them here is the same for both.

Torch's callables give out their buffers themselves, which the next replay overwrites: autograd keeps the gradient of a
parameter that comes first as it is, and a second microbatch would write over it (pytorch/pytorch issue 181723). Here
whatever leaves is a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = Callable[..., tuple[Tensor, ...]]


class Graphs(Protocol):
    """Makes graphs that share memory: a forward pass and its backward pass come to an end before the next begins."""

    def __call__(self, function: Function, samples: tuple[Tensor, ...]) -> Function:
        """Capture a function and its backward pass.

        Args:
            function: of tensors; it gives tensors.
            samples: its arguments, which become the fixed buffers. Those that require gradients get them.

        Returns:
            A function of as many tensors. It copies them into the buffers, unless they are there, and gives the fixed
            outputs; in the backward pass, the fixed gradients.
        """


class Turn:
    """Whose memory it is: a forward pass begins it, its backward pass ends it."""

    def __init__(self) -> None:
        self.taken = False


class Replayed:
    """A function that was captured with some inputs, and takes others like them.

    Args:
        graphs: what captures it.
        turn: of all functions that ``graphs`` captured.
        function: of the inputs, which it may not write to. What it computes depends on their values alone, and on the
            parameters.
        inputs: examples of them: shapes, types and whether gradients are wanted hold from here on. The function is run
            on them a few times, and what it leaves elsewhere is not to be used.
        parameters: that the function uses and that get gradients.
    """

    def __init__(
        self,
        graphs: Graphs,
        turn: Turn,
        function: Function,
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> None:
        buffers = [each.detach().clone().requires_grad_(each.requires_grad) for each in inputs]
        count = len(buffers)
        self._turn, self._parameters = turn, tuple(parameters)
        self._kinds, self._places = list(map(_kind, inputs)), _places(parameters)
        self._run = graphs(lambda *given: function(*given[:count]), (*buffers, *parameters))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs of a replay, with gradients; they stay what they are.

        Raises:
            RuntimeError: if an input is another kind of tensor than at the capture, a parameter is not where it was, or
                the backward pass of the last replay is still to come.
        """
        if (found := list(map(_kind, inputs))) != self._kinds:
            raise RuntimeError(f"a graph of tensors {self._kinds} was given {found}")
        if _places(self._parameters) != self._places:
            raise RuntimeError("a parameter has moved in memory since it was captured in a graph, which reads the old")
        if self._turn.taken:
            raise RuntimeError("a graph was to be replayed before the backward pass of the one before")
        given = [*inputs, *self._parameters]
        wanted = [number for number, each in enumerate(given) if each.requires_grad]
        own = _OwnGradients.apply(*(given[number] for number in wanted)) if wanted else ()
        for number, each in zip(wanted, own, strict=True):
            given[number] = each
        return list(_OwnValues.apply(self._turn, *self._run(*given)))


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


class _OwnGradients(torch.autograd.Function):
    """The same tensors, whose gradients are copies; all at once, for a host that was to be spared."""

    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(each.view_as(each) for each in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [each for each in gradients if each is not None]
        copies = [torch.empty_like(each) for each in present]
        torch._foreach_copy_(copies, present)
        own = iter(copies)
        return tuple(None if each is None else next(own) for each in gradients)


class _OwnValues(torch.autograd.Function):
    """Copies, from which on the turn is taken until the backward pass begins."""

    @staticmethod
    def forward(ctx: Any, turn: Turn, *values: Tensor) -> tuple[Tensor, ...]:
        turn.taken, ctx.turn = any(ctx.needs_input_grad), turn
        return tuple(each.clone() for each in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.turn.taken = False
        return None, *gradients
