"""The README's commands for a cluster, made small enough for this one."""

from __future__ import annotations

import re
import shlex

from tests.slurm.desk import ROOT

COMMAND = re.compile(r"^(?:sbatch|python -m launchers\.(?:slurm|submitit)) .*$", re.MULTILINE)
TRAIN = "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 slurm/train_lrs3.sh"
EVALUATE = "sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 slurm/eval.sh"
SLURM = "python -m launchers.slurm experiment=lrs3"
SUBMITIT = "python -m launchers.submitit experiment=lrs3"
SWEEP = "python -m launchers.submitit --multirun experiment=lrs3"
PREPARE = "sbatch --array=0-15 --cpus-per-task=16 --time=12:00:00 slurm/prepare.sh"
ALL = (TRAIN, EVALUATE, SLURM, SUBMITIT, SWEEP, PREPARE)


def documented_commands() -> list[str]:
    """Every command for a cluster that the README names."""
    return COMMAND.findall((ROOT / "README.md").read_text())


def command(start: str, ranks: int = 2) -> list[str]:
    """The documented command that starts so, with ``ranks`` ranks on a node instead of eight."""
    (found,) = [text for text in documented_commands() if text.startswith(start)]
    return [re.sub("=8$", f"={ranks}", word) for word in shlex.split(found)]
