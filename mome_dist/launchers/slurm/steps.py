"""The commands that run a Python module in this allocation: options of srun, and the container that it runs in."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mome_dist.launchers.options import ContainerOptions


@dataclass(frozen=True)
class Steps:
    """How processes are started on the nodes of a job.

    Attributes:
        srun: further options of srun.
        container: that they run in.
        folder: the checkout, where they run.
    """

    srun: Sequence[str] = ()
    container: ContainerOptions = field(default_factory=ContainerOptions)
    folder: Path = field(default_factory=Path.cwd)

    def command(self, options: Sequence[str], module: str, *arguments: str) -> list[str]:
        """``srun OPTIONS... python -m MODULE ARGUMENTS...``, no word of which goes through a shell."""
        container = self.container
        command = ["srun", *options, *self.srun]
        if container.image is not None:
            mounts = [f"{self.folder}:{self.folder}", *(_both_sides(mount) for mount in container.mounts)]
            command += [
                f"--container-image={container.image}",
                f"--container-mounts={','.join(mounts)}",
                f"--container-workdir={self.folder}",
            ]
        inside = container.image is not None or container.prefix
        python = container.python if inside else sys.executable
        return [*command, *container.prefix, python, "-m", module, *arguments]


def _both_sides(mount: str) -> str:
    return mount if ":" in mount else f"{mount}:{mount}"
