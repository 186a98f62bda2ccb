"""What the planner predicts against what real worlds need: memory of every rank and the order of layouts by speed.

    python -m benchmarks.plan_layout

Rates come from this machine, measured as `tools/check_cluster.py` does. The table goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import RESULTS, write_results
from mome_dist.cli import main_guard
from mome_dist.quiet import quiet_libraries


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_layout",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, help="steps of each layout; the median counts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    # Workers are forked: no library may start threads before that.
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1", HF_DEACTIVATE_ASYNC_LOAD="1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    quiet_libraries()
    import torch

    from benchmarks.measuring import machine
    from benchmarks.plan_cases import measure, render

    torch.set_num_threads(1)
    described = machine()
    with tempfile.TemporaryDirectory() as scratch:
        rates, figures = measure(options.rounds, Path(scratch))
    path = write_results(
        name="plan_layout",
        title="Plans against real worlds",
        command=f"python -m benchmarks.plan_layout --rounds {options.rounds}",
        machine=described,
        sections=render(figures),
        figures={"rates": rates, "cases": figures},
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
