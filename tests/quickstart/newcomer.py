"""A place to run the project's commands in as a newcomer would: a folder, and a cache that holds the fetched assets."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from mome_dist.assets import assets_root
from mome_dist.commands.launch import divide
from mome_dist.commands.registry import find_command
from tests import forked_commands
from tests.documentation import words_of
from tests.patience import patience

ROOT = Path(__file__).resolve().parents[2]
# Programs that import the training stack, which takes longer than what most of the commands do afterwards.
HEAVY = {
    "mome_dist.train",
    "mome_dist.evaluate",
    "mome_dist.pretrain_llm",
    "mome_dist.transcribe",
    "mome_dist.commands.export",
    "mome_dist.commands.reshard",
    "mome_dist.commands.tune",
    "mome_dist.commands.verify",
}
SHOWN_TO_START = {"mome_dist.commands.tune"}  # in interpreters of their own, by tests/parallel/test_tuning.py


@dataclass(frozen=True)
class Newcomer:
    """Runs commands in ``folder``; artefacts go into ``folder/cache``.

    The first of each heavy program has interpreters of its own, as a newcomer's, unless ``forks``; the next ones, with
    other arguments, are forks of this process, which has imported the same.
    """

    folder: Path
    forks: bool = False
    _known: set[str] = field(default_factory=SHOWN_TO_START.copy, init=False)

    @classmethod
    def arrive(cls, folder: Path, forks: bool = False) -> Newcomer:
        """Lay out the folder."""
        for name in ("launchers", "tools", "configs"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "cache").mkdir()
        (folder / "cache/assets").symlink_to(assets_root())
        return cls(folder, forks)

    def run(self, command: str | list[str], timeout: float = 300) -> str:
        """Run ``mome-dist ...`` or ``python ...`` with this Python; return its standard output.

        Any other exit code than 0 fails.
        ``timeout`` is that of an idle machine.
        """
        arguments = words_of(command) if isinstance(command, str) else command
        environment = {**os.environ, "MOME_DIST_CACHE": str(self.folder / "cache"), "PYTHONPATH": str(ROOT)}
        program = _program(arguments)
        if program in HEAVY and (self.forks or program in self._known):
            done = forked_commands.run(arguments[1:], self.folder, environment, patience(timeout))
        else:
            done = subprocess.run(
                [sys.executable, *arguments[1:]],
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=patience(timeout),
            )
        self._known.add(program)
        shown = shlex.join(arguments)
        assert done.returncode == 0, f"{shown} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def default_corpus(self) -> Path:
        """Where the configuration expects the corpus of `tools/make_corpus.py`."""
        code = "from mome_dist.config import load_config; print(load_config([]).data.corpus)"
        return Path(self.run(["python", "-c", code]).strip())


def _program(arguments: list[str]) -> str:
    """The module that a command of mome-dist runs, alone or on every rank; another command's own first word."""
    if arguments[1:3] != ["-m", "mome_dist"]:
        return arguments[0]
    command, words = find_command(arguments[3:])
    if command.name == "launch":
        command = divide("local", words)[1] or command
    return command.module
