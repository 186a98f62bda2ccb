"""transformers' auto classes know exports, and nothing is imported for it before they are.

`announce`, which ``import mome_dist`` calls, waits for the two modules of transformers that hold the tables of
configurations and models, and fills in a line of each as soon as it has been imported, or at once where it has been.
Launchers import mome_dist and validate within a second, without torch or transformers; so the lines name this
project's classes by where they are, and the model itself is imported when somebody loads one.

A hook on the import of a module is what PEP 369 describes and PEP 302's finders allow. It touches nothing but the two
modules, hands both back with the loaders that they would have had, and takes itself out when it has done its work.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPE, ARCHITECTURE = "mome_dist", "MoMESpeechModel"

# By name, as transformers has its own models in its tables: these modules need most of mome_dist.
_CONFIGURATION, _MODEL = "mome_dist.export.pretrained_config", "mome_dist.export.pretrained"


def announce() -> None:
    """Make ``AutoConfig`` and ``AutoModel`` read exports, from now or from when they are imported."""
    waiting = {}
    for name, register in _STEPS.items():
        module = sys.modules.get(name)
        if module is None:
            waiting[name] = register
        else:
            register(module)
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))


def _register_configuration(module: ModuleType) -> None:
    module.AutoConfig.register(MODEL_TYPE, _configuration(), exist_ok=True)


def _register_model(module: ModuleType) -> None:
    members = {"config_class": _configuration(), "__module__": __name__, "__doc__": _LaterModel.__doc__}
    module.AutoModel.register(_configuration(), _LaterModel(ARCHITECTURE, (), members), exist_ok=True)


_STEPS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_configuration,
    "transformers.models.auto.modeling_auto": _register_model,
}


def _configuration() -> Any:
    return importlib.import_module(_CONFIGURATION).MoMESpeechConfig


class _LaterModel(type):
    """Stands for the class of exports in transformers' table: what it is asked for, it asks of that class, which is
    imported then."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(getattr(importlib.import_module(_MODEL), ARCHITECTURE), name)


class _Finder(MetaPathFinder):
    """Finds the modules that are waited for where they would be found without it."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]) -> None:
        self._waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register = self._waiting.get(fullname)
        if register is None:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, lambda module: self._imported(fullname, module))
        return spec

    def _imported(self, name: str, module: ModuleType) -> None:
        self._waiting.pop(name)(module)
        if not self._waiting:
            sys.meta_path.remove(self)


class _Loader(Loader):
    """Loads a module as its own loader does, leaves that in its place, and tells."""

    def __init__(self, own: Loader, tell: Callable[[ModuleType], None]) -> None:
        self._own, self._tell = own, tell

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._own
        self._own.exec_module(module)
        self._tell(module)
