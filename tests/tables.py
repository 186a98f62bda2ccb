"""Tables of pages that have a command line in every row, and the runs that these lines are."""

from __future__ import annotations

import re

from mome_dist.parallel.layout import Layout
from mome_dist.verification.probe import Probe
from mome_dist.verification.run import Case, run_case


def rows_of(page: str) -> dict[str, list[str]]:
    """The cells of each row that begins with a name in backquotes, by that name."""
    lines = re.findall(r"^\| `\w+` \|.*", page, re.M)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("|` "): row for row in rows}


def words(cell: str) -> list[str]:
    """The arguments that a cell has in backquotes."""
    return cell.strip("`| ").split()


def losses_of(probes: list[Probe]) -> list[list[float]]:
    """The losses of every step of each, trained in one process."""
    return [run_case(probe, Case("", Layout.for_world(1), dispatch="local"), "sgd", None).losses for probe in probes]
