"""Write the scripts for sbatch into a folder, to be submitted from there: a wheel has no checkout around it.

    mome-dist slurm init /shared/work
    cd /shared/work && sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/train_lrs3.sh

They come into DIR/slurm, as a checkout has them, and run the Python of this command: another one is MOME_DIST_PYTHON.
Files that are there already stay as they are, and end the command before it writes any.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.errors import UserError, no_folder
from mome_dist.files import write_text
from mome_dist.paths import slurm_dir

_PYTHON = "    MOME_DIST_PYTHON=python\n"


def command_line() -> Parser:
    """Its argument."""
    parser = command_parser("slurm init", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder on a file system that all nodes mount")
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Write them, and say what can be submitted."""
    directory = command_line().parse_args(arguments).directory
    if not directory.is_dir():
        raise UserError(f"{directory} {no_folder(directory)}; make it first, on a file system that all nodes mount.")
    for path in write_scripts(directory):
        print(path)


def write_scripts(directory: Path) -> list[Path]:
    """Copy the scripts into ``directory/slurm``; returns the files.

    Raises:
        UserError: one of them is there already.
    """
    scripts = {path.name: path.read_text(encoding="utf-8") for path in sorted(slurm_dir().glob("*.sh"))}
    target = directory / "slurm"
    for name in scripts:
        if (target / name).exists():
            raise UserError(f"{target / name} exists, and is not replaced: remove it or choose another folder.")
    common = scripts["common.sh"]
    assert common.count(_PYTHON) == 1, "what is replaced is there"
    scripts["common.sh"] = common.replace(_PYTHON, f"    MOME_DIST_PYTHON={shlex.quote(sys.executable)}\n")
    target.mkdir(exist_ok=True)
    for name, text in scripts.items():
        write_text(target / name, text)
    return [target / name for name in scripts]


if __name__ == "__main__":
    sys.exit(main())
