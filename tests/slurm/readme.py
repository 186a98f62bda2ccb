"""The documentation's commands for a cluster, made small enough for this one."""

from __future__ import annotations

import re

from tests import documentation

TRAIN = "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 slurm/train_lrs3.sh"
EVALUATE = "sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 slurm/eval.sh"
SLURM = "mome-dist launch slurm launcher.nodes=2"
SUBMITIT = "mome-dist launch submitit launcher.nodes=2"
SWEEP = "mome-dist launch submitit --multirun"
PREPARE = "sbatch --array=0-15 --cpus-per-task=16 --time=12:00:00 slurm/prepare.sh"
ALL = (TRAIN, EVALUATE, SLURM, SUBMITIT, SWEEP, PREPARE)


def documented_commands() -> list[str]:
    """Every command for a cluster that the documentation names."""
    return [command for command, _ in documentation.commands(cluster=True)]


def command(start: str, ranks: int = 2) -> list[str]:
    """The documented command that starts so, with ``ranks`` ranks on a node instead of eight."""
    (found,) = [text for text in documented_commands() if text.startswith(start)]
    return [re.sub("=8$", f"={ranks}", word) for word in documentation.words_of(found)]
