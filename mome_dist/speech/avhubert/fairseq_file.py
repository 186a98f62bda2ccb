"""Reading a fairseq checkpoint without fairseq, and without running anything that the file says.

Such a file is a pickle that refers to classes of fairseq, omegaconf and argparse beside its tensors. It is read by
torch's restricted loader (``weights_only=True``); every class that this loader does not know is replaced by an inert
record of the same name, so nothing of the file's choosing is imported or called.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mome_dist.errors import UserError, first_line
from mome_dist.files import check_downloaded

# What only an attack refers to. It would not run either: this is for the message.
_ATTACKS = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|socket|runpy)\..*|builtins\.(eval|exec|compile|open|__import__)"
)
_AGAIN = "download it again"


class Inert:
    """Stands for an object of a class that is not loaded; keeps its state, does nothing."""

    state: Any = None

    def __new__(cls, *_arguments: Any) -> Inert:
        """Take any arguments and ignore them."""
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        self.state = arguments

    def __repr__(self) -> str:
        """For torch's messages."""
        return "<object that is not loaded>"

    def __setstate__(self, state: Any) -> None:
        """Keep what the object held."""
        self.state = state


@dataclass(frozen=True)
class FairseqFile:
    """What a checkpoint holds.

    Attributes:
        tensors: the model's, by name.
        settings: of the (pre-trained) model, as far as they are told; plain values.
        ignored: names of the classes that were not loaded.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    ignored: list[str]


def read_fairseq(path: str | Path) -> FairseqFile:
    """Read a checkpoint.

    Raises:
        UserError: the file is missing, damaged, in the format before torch 1.6, refers to what no checkpoint needs, or
            holds no model.
    """
    path = Path(path)
    check_downloaded(path)
    try:
        with _allowed([]):
            unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except ValueError as error:
        raise UserError(
            f"{path} is no file of torch 1.6 or later ({error}); {_AGAIN}, or load and save it with a newer torch."
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); {_AGAIN}.") from error
    for name in unknown:
        if _ATTACKS.fullmatch(name):
            raise UserError(f"{path} refers to {name}, which no checkpoint needs: do not trust this file.")
    try:
        with _allowed([(Inert, name) for name in unknown]):
            content = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); {_AGAIN}.") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model or not all(isinstance(value, Tensor) for value in model.values()):
        raise UserError(f"{path} holds no 'model' of tensors: it is no fairseq checkpoint.")
    return FairseqFile({str(name): value for name, value in model.items()}, _settings(content), unknown)


@contextmanager
def _allowed(classes: list[Any]) -> Iterator[None]:
    """Allow these classes and no others: libraries in this process may have allowed some of their own."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(classes)
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the pre-trained model, which a fine-tuned one holds in ``w2v_args``, and those of its pictures,
    which are the task's: the outer one's, on whose data the model trained last."""
    for key in ("cfg", "args"):
        settings = plain(content.get(key))
        if isinstance(settings, dict):
            model, pictures = _section(settings, "model"), _pictures(settings)
            inner = model.get("w2v_args")
            if isinstance(inner, dict):
                model, pictures = _section(inner, "model"), _pictures(inner) | pictures
            return model | pictures
    return {}


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of settings; those of an argparse namespace have none, all keys stand side by side."""
    section = settings.get(name, settings)
    return section if isinstance(section, dict) else settings


def _pictures(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _section(settings, "task").items() if key.startswith("image_")}


def plain(value: Any) -> Any:
    """Plain values from what was stored as omegaconf containers or argparse namespaces."""
    if isinstance(value, Inert):
        state = value.state
        if isinstance(state, dict):
            return plain(state.get("_content", state.get("_val", state)))
        return plain(list(state)) if isinstance(state, tuple) else state
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _reason(error: BaseException) -> str:
    """The line of torch's message that says what is wrong."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1].strip() if found else first_line(error)
