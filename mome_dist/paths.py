"""Where things live: cached artefacts (assets, corpora, encoders, small LLMs, features) and the configuration tree."""

from __future__ import annotations

import os
from pathlib import Path

from mome_dist.errors import UserError


def cache_root() -> Path:
    """Return the cache directory: ``$MOME_DIST_CACHE`` if set, else ``~/.cache/mome_dist``. It may not exist yet."""
    configured = os.environ.get("MOME_DIST_CACHE")
    return Path(configured).expanduser().resolve() if configured else Path.home() / ".cache" / "mome_dist"


def configs_dir() -> Path:
    """Return the directory of the Hydra configuration tree.

    A checkout's ``configs/`` comes first, because that is the one a user edits; an installed wheel carries a copy
    inside the package (see ``package_dir`` in ``setup.py``).

    Raises:
        UserError: the installation holds neither.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent / "configs"
    # setup.py tells a checkout from a site-packages folder where another project may have left a `configs`.
    if checkout.is_dir() and (package.parent / "setup.py").is_file():
        return checkout
    packaged = package / "configs"
    if packaged.is_dir():
        return packaged
    raise UserError(f"no configs directory in {checkout} or {packaged}: reinstall mome_dist")
