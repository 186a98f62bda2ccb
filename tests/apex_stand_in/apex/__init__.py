"""As in Apex, ``import apex`` brings its parts along."""

from . import normalization, optimizers

__all__ = ["normalization", "optimizers"]
