"""torch's compiler is loaded by the first call of a function that a library compiles, not by its definition.

Megatron-Core and DeepSpeed give functions to ``torch.compile`` where they define them, which loads the compiler in
every rank: a third of what its imports compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_LIBRARIES = ("megatron.", "deepspeed.")


def compile_when_called() -> None:
    """Call before the first import of Megatron-Core or DeepSpeed; imports torch, and is safe to call again."""
    import torch

    if not hasattr(torch.compile, "__wrapped__"):  # it has not been done
        torch.compile = _when_called(torch.compile)


def _when_called(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    """Make a decorator like ``torch.compile`` that puts off what the libraries ask for."""

    @functools.wraps(compile_now)
    def decorator(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(decorator, **options)
        if not getattr(function, "__module__", "").startswith(_LIBRARIES):
            return compile_now(function, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    return decorator
