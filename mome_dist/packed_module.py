"""Modules that keep many tensors in few parameters.

An engine reduces, flattens and steps every parameter by itself, and hundreds of small ones cost it more than their
numbers do. Here tensors lie one after another in a parameter, and a state dict names them one by one: a checkpoint of
the engine is, in names and places, that of a module without the packing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class PackedTensor(NamedTuple):
    """A tensor inside a parameter: its name in a state dict, the parameter, the first of its elements in row-major
    order, and its shape."""

    name: str
    parameter: Tensor
    start: int
    shape: tuple[int, ...]

    def of(self, values: Tensor) -> Tensor:
        """Its part, a view, of what is shaped like the parameter."""
        return values.view(-1)[self.start : self.start + math.prod(self.shape)].view(self.shape)


class PackedModule(nn.Module):
    """A module all of whose own parameters are packed; modules in it are as they are."""

    def tensors(self) -> Iterator[PackedTensor]:
        """Every tensor in every parameter, in the order of a state dict."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for tensor in self.tensors():
            destination[prefix + tensor.name] = tensor.of(tensor.parameter if keep_vars else tensor.parameter.detach())

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        views = {prefix + tensor.name: tensor.of(tensor.parameter.detach()) for tensor in self.tensors()}
        for name, view in views.items():
            value = state_dict.get(name)
            if value is None:
                missing_keys.append(name)
            elif value.shape != view.shape:
                error_msgs.append(f"{name} has shape {list(value.shape)}, expected {list(view.shape)}")
            else:
                view.copy_(value)
        inside = tuple(f"{prefix}{name}." for name in self._modules)
        others = (name for name in state_dict if name.startswith(prefix) and name not in views)
        unexpected_keys += [name for name in others if not name.startswith(inside)]


def saved_under(module: nn.Module, inside: str, saved: str) -> None:
    """Let a module's state dict call what begins with ``inside`` by ``saved`` instead, when it is saved and when it is
    loaded; the rest of the name stays."""

    def save(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        _rename(state, prefix + inside, prefix + saved)

    module.register_state_dict_post_hook(save)
    loaded_from(module, saved, inside)


def loaded_from(module: nn.Module, saved: str, inside: str) -> None:
    """Let a module load what begins with ``inside`` from what begins with ``saved``, if a state dict has that."""

    def load(_module: nn.Module, state: dict[str, Any], prefix: str, *_settings: Any) -> None:
        _rename(state, prefix + saved, prefix + inside)

    module.register_load_state_dict_pre_hook(load)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for name in [name for name in state if name.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)
