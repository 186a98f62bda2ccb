"""What the planner predicts against what real worlds need: memory of every rank and the order of layouts by speed.

    python -m benchmarks.plan_layout
    python -m benchmarks.plan_layout --predict      # measures nothing: new predictions for what was measured before

Rates come from this machine, measured as `tools/check_cluster.py` does. The table goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
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
    parser.add_argument("--predict", action="store_true", help="only predict anew, for what --results holds measured")
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
    from benchmarks.plan_cases import add_predictions, measure, render

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if options.predict:
            known = json.loads((options.results / "plan_layout.json").read_text(encoding="utf-8"))
            described, command = known["machine"], known["command"]
            rates, figures = known["figures"]["rates"], known["figures"]["cases"]
        else:
            described, command = machine(), f"python -m benchmarks.plan_layout --rounds {options.rounds}"
            rates, figures = measure(options.rounds, Path(scratch))
        add_predictions(rates, described["cores"], figures, Path(scratch))
    path = write_results(
        name="plan_layout",
        title="Plans against real worlds",
        command=command,
        machine=described,
        sections=render(figures),
        figures={"rates": rates, "cases": figures},
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
