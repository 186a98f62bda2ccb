"""Versions of this code and of the packages that it uses, for records; a record is never a reason to stop."""

from __future__ import annotations

import subprocess
from pathlib import Path

__version__ = "0.1.0"

UNKNOWN = "unknown"
ROOT = Path(__file__).resolve().parents[1]


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


def commit_here(*ignored: str) -> str:
    """The commit of this checkout, "with changes" if tracked files differ from it; "no known commit" outside of git.

    Args:
        ignored: paths in the checkout whose changes are none.
    """
    git = ["git", "-C", str(ROOT)]

    def told(*words: str) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(told("rev-parse", "--show-toplevel")) != ROOT:
            return "no known commit"  # installed into somebody else's repository
        commit = told("rev-parse", "--short", "HEAD")
        changed = told("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in ignored))
    except (OSError, subprocess.CalledProcessError):
        return "no known commit"
    return f"commit {commit}" + (" with changes" if changed else "")
