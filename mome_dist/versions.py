"""Versions of this code and of the packages that it uses, for records; a record is never a reason to stop."""

from __future__ import annotations

__version__ = "0.1.0"

UNKNOWN = "unknown"


def version_of(package: str) -> str:
    """Version of a package as it was installed, of mome_dist as its code says; "unknown" where nothing tells it.

    A checkout that is only mounted or on PYTHONPATH has no metadata, and metadata of another copy may lie beside it.
    """
    import importlib.metadata  # takes longer than all else that `import mome_dist` does

    if package == "mome_dist":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
