"""Versions of this code and of the packages that it uses, for records; a record is never a reason to stop."""

from __future__ import annotations

import importlib.metadata

import mome_dist

UNKNOWN = "unknown"


def version_of(package: str) -> str:
    """Version of a package as it was installed, of mome_dist as its code says; "unknown" where nothing tells it.

    A checkout that is only mounted or on PYTHONPATH has no metadata, and metadata of another copy may lie beside it.
    """
    if package == mome_dist.__name__:
        return mome_dist.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
