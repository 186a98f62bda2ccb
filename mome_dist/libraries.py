"""What is done before the first import of Megatron-Core, DeepSpeed or transformers.

Known, harmless notices stay out of a run's output, so that what is printed is worth reading; and torch's compiler is
loaded by the first call of a function that a library compiles, not by its definition. Few runs call one, and every rank
would load the compiler for a third of the time that it takes to start.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

_COMPILED = ("megatron.", "deepspeed.")


def prepare_libraries() -> None:
    """Call before the first import of Megatron-Core, DeepSpeed or transformers; imports torch."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Apex and Transformer Engine are optional; Megatron-Core says in five places that it runs without them.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
    warnings.filterwarnings("ignore", message="full scope is deprecated.*")
    # Renamed in the newest torch; DeepSpeed and Megatron-Core call the old name.
    warnings.filterwarnings("ignore", message=".*`torch.distributed.*` is deprecated.*")
    # Layers with a MoME slot are subclasses of Megatron's, which it reports for every layer.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    compile_when_called()


def compile_when_called() -> None:
    """Have functions that Megatron-Core and DeepSpeed give to ``torch.compile`` compiled by their first call."""
    import torch

    if not hasattr(torch.compile, "__wrapped__"):  # it has not been done
        torch.compile = _when_called(torch.compile)


def _when_called(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator like ``torch.compile``."""

    @functools.wraps(compile_now)
    def decorator(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(decorator, **options)
        if not getattr(function, "__module__", "").startswith(_COMPILED):
            return compile_now(function, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    return decorator
