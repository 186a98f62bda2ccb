"""A place to run the project's commands in as a newcomer would: a folder, and a cache that holds the fetched assets."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mome_dist.assets import assets_root
from tests.patience import patience

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Newcomer:
    """Runs commands in ``folder``; artefacts go into ``folder/cache``."""

    folder: Path

    @classmethod
    def arrive(cls, folder: Path) -> Newcomer:
        """Lay out the folder."""
        for name in ("launchers", "tools", "configs"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "cache").mkdir()
        (folder / "cache/assets").symlink_to(assets_root())
        return cls(folder)

    def run(self, command: str | list[str], timeout: float = 300) -> str:
        """Run ``python ...`` with this Python and return its standard output; any other exit code than 0 fails.

        ``timeout`` is that of an idle machine.
        """
        arguments = shlex.split(command) if isinstance(command, str) else command
        environment = {**os.environ, "MOME_DIST_CACHE": str(self.folder / "cache"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *arguments[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=patience(timeout),
        )
        shown = shlex.join(arguments)
        assert done.returncode == 0, f"{shown} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def default_corpus(self) -> Path:
        """Where the configuration expects the corpus of `tools/make_corpus.py`."""
        code = "from mome_dist.config import load_config; print(load_config([]).data.corpus)"
        return Path(self.run(["python", "-c", code]).strip())
