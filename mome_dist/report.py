"""Command: a run as a page with figures, in Markdown and as one HTML file; or several runs compared.

    mome-dist report runs/quickstart
    mome-dist report compare runs/tiny runs/tiny_noise [output=DIR]

The argument may be a checkpoint of the run, too; run=DIR says the same. Writes ``report/report.md``,
``report/report.html`` and PNG figures into the run directory. Works while the run trains, and before it is evaluated.

``compare`` takes two runs or more and sets the others against the first: differences of configuration, losses, and word
error rates with the interval of each difference. It writes ``report/against-OTHERS/`` in the first run, or output=DIR.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mome_dist.cli import main_guard
from mome_dist.errors import UserError
from mome_dist.evaluation.request import parse_request
from mome_dist.trained import place_of, run_of

COMPARE = "compare"


@dataclass
class ReportRequest:
    """Arguments of ``mome-dist report``: ``run``, a run directory."""

    run: str = ""


@dataclass
class CompareRequest:
    """Arguments of ``mome_dist.report compare`` beside the runs: ``output``, where the page goes."""

    output: str | None = None


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and write the report or the comparison; print the files."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["-h"], ["--help"]):
        print(__doc__)
        return
    for page in _compared(given[1:]) if given[:1] == [COMPARE] else _reported(given):
        print(page)


def _reported(arguments: Sequence[str]) -> list[Path]:
    request = parse_request(ReportRequest, arguments)
    if not request.run:
        raise UserError("no run is named: give its directory, mome-dist report runs/NAME.")
    run = run_of(request.run)
    from mome_dist.evaluation.report import write_report  # slow: torch

    return write_report(run)


def _compared(arguments: Sequence[str]) -> list[Path]:
    places: list[str] = []
    others: list[str] = []
    for word in arguments:
        place = None if word.startswith("-") else place_of(word)
        (others if place is None else places).append(word if place is None else place)
    request = parse_request(CompareRequest, others)
    if len(places) < 2:
        raise UserError("compare takes two runs or more: mome-dist report compare runs/A runs/B.")
    runs = [run_of(place) for place in places]
    from mome_dist.evaluation.run_comparison import write_comparison  # slow: torch

    return write_comparison(runs, None if request.output is None else Path(request.output))


if __name__ == "__main__":
    sys.exit(main())
