"""The least that an engine trains: modules that lie whole on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mome_dist.parallel.parts import NamedPart, whole_parts
from mome_dist.sharing import Sharing


class Replicated:
    """Modules that train and lie whole on every rank."""

    def __init__(self, modules: torch.nn.ModuleDict) -> None:
        self._modules = modules

    def trainable_modules(self) -> torch.nn.ModuleDict:
        return self._modules

    def trained_parts(self) -> Iterator[NamedPart]:
        for name, module in self._modules.items():
            yield from whole_parts(name, module, Sharing())
