"""Where cached artefacts live: assets, corpora, encoders, small LLMs and features."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the cache directory: ``$MOME_DIST_CACHE`` if set, else ``~/.cache/mome_dist``. It may not exist yet."""
    configured = os.environ.get("MOME_DIST_CACHE")
    return Path(configured).expanduser().resolve() if configured else Path.home() / ".cache" / "mome_dist"
