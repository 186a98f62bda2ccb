"""Command: a run as a Markdown page with figures.

    mome-dist report runs/quickstart

The argument may be a checkpoint of the run, too; run=DIR says the same. Writes ``report/report.md`` and PNG figures
into the run directory. Works while the run trains, and before it is evaluated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mome_dist.cli import main_guard
from mome_dist.errors import UserError
from mome_dist.evaluation.request import parse_request
from mome_dist.trained import run_of


@dataclass
class ReportRequest:
    """Arguments of ``mome-dist report``: ``run``, a run directory."""

    run: str = ""


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse ``key=value`` arguments and write the report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) in (["-h"], ["--help"]):
        print(__doc__)
        return
    request = parse_request(ReportRequest, arguments)
    if not request.run:
        raise UserError("no run is named: give its directory, mome-dist report runs/NAME.")
    run = run_of(request.run)
    from mome_dist.evaluation.report import write_report  # slow: torch

    print(write_report(run))


if __name__ == "__main__":
    sys.exit(main())
