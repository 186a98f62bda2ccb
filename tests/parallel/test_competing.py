"""Two runs in one output directory (see `tests.parallel.competing`): neither kills nor long sleeps damage anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.competing import REFUSED, compete

pytestmark = pytest.mark.parallel


def test_killed_runs_leave_whole_checkpoints_and_never_two_owners(tmp_path: Path) -> None:
    report = compete(tmp_path, kills=12, seed=1)
    assert report.ends[REFUSED] and report.resumed[-1] > 0, report


def test_a_run_that_slept_too_long_stops_before_it_writes(tmp_path: Path) -> None:
    report = compete(tmp_path, kills=4, seed=2, sleeping=True, overtaken=1)
    assert report.sleeps and report.resumed[-1] > 0, report
