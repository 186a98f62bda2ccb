"""Where things live: cached artefacts (assets, corpora, encoders, small LLMs, features) and the configuration tree."""

from __future__ import annotations

import os
from pathlib import Path

from mome_dist.errors import UserError


def cache_root() -> Path:
    """Return the cache directory: ``$MOME_DIST_CACHE`` if set, else ``~/.cache/mome_dist``. It may not exist yet.

    Raises:
        UserError: this user has no home directory, and the variable does not name another place.
    """
    configured = os.environ.get("MOME_DIST_CACHE")
    try:
        return Path(configured).expanduser().absolute() if configured else Path.home() / ".cache" / "mome_dist"
    except RuntimeError as error:  # what pathlib raises where it finds no home directory
        raise UserError(
            f"the cache is in {configured or '~/.cache/mome_dist'}, but HOME is not set and user {os.getuid()} has no "
            "home directory: set MOME_DIST_CACHE to a directory."
        ) from error


def has_home() -> bool:
    """Whether this user has a home directory, by HOME or in the system's list of users."""
    try:
        Path.home()
    except RuntimeError:
        return False
    return True


def configs_dir() -> Path:
    """Return the directory of the Hydra configuration tree.

    A checkout's ``configs/`` comes first, because that is the one a user edits; an installed wheel carries a copy
    inside the package (see ``package_dir`` in ``setup.py``).

    Raises:
        UserError: the installation holds neither.
    """
    return _carried("configs")


def slurm_dir() -> Path:
    """Return the directory of the scripts for sbatch, found as `configs_dir` is. Raises UserError likewise."""
    return _carried("slurm")


def _carried(name: str) -> Path:
    package = Path(__file__).resolve().parent
    checkout = package.parent / name
    # setup.py tells a checkout from a site-packages folder where another project may have left a folder of this name.
    if checkout.is_dir() and (package.parent / "setup.py").is_file():
        return checkout
    packaged = package / name
    if packaged.is_dir():
        return packaged
    raise UserError(f"no {name} directory in {checkout} or {packaged}: reinstall mome_dist")
