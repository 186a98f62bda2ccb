"""The state of every random-number generator of a process, as tensors.

What training draws at random (order, views, initial values) is a function of the seed and the step, never of these
generators, which is why another layout can go on without them. At the same layout they are put back all the same, so
that a library that draws from one continues as if nothing had happened.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """The generators of Python, NumPy, torch (CPU and this process's GPU) and Megatron-Core: uint8 tensors by name."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": _packed(random.getstate()),
        "numpy": _packed([kind, np.asarray(keys).tolist(), position, has_gauss, gauss]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {f"megatron/{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    return {name: state.clone() for name, state in states.items()}


def set_random_state(states: dict[str, Tensor]) -> None:
    """Put back what `random_state` returned in a process with the same kinds of generators."""
    version, numbers, gauss = _unpacked(states["python"])
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = _unpacked(states["numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    megatron = {name.removeprefix("megatron/"): state for name, state in states.items() if name.startswith("megatron/")}
    get_cuda_rng_tracker().set_states(megatron)


def _packed(state: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _unpacked(state: Tensor) -> Any:
    return json.loads(bytes(state.numpy()))
