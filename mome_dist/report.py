"""Command: a run as a Markdown page with figures.

    python -m mome_dist.report run=runs/quickstart

Writes ``report/report.md`` and PNG figures into the run directory. Works while the run trains, and before it is
evaluated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mome_dist.cli import main_guard
from mome_dist.errors import UserError
from mome_dist.evaluation.report import write_report
from mome_dist.evaluation.request import parse_request


@dataclass
class ReportRequest:
    """Arguments of ``mome_dist.report``: ``run``, a run directory."""

    run: str = ""


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse ``key=value`` arguments and write the report."""
    request = parse_request(ReportRequest, sys.argv[1:] if arguments is None else arguments)
    if not request.run:
        raise UserError("run is missing: give run=DIR, the directory of a run.")
    print(write_report(Path(request.run)))


if __name__ == "__main__":
    sys.exit(main())
