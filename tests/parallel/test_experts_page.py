"""docs/experts.md: a row for every form of an expert, whose command trains and whose counts are true."""

from __future__ import annotations

import math
from pathlib import Path

from mome_dist.config import load_config
from mome_dist.config.values import check_values
from mome_dist.evaluation.arithmetic import mome_parameters
from mome_dist.moe.forms.registry import FORMS, find_form
from mome_dist.parallel.layout import Layout
from mome_dist.preflight import check_experts
from mome_dist.verification.probe import Probe, shrunk
from tests.parallel.worlds import run_world
from tests.probes import OVERRIDES
from tests.tables import losses_of, rows_of, words

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/experts.md").read_text()
COLUMNS, HIDDEN = 7, 3072


def test_every_form_has_a_row_that_trains_and_counts(tmp_path: Path) -> None:
    rows = rows_of(PAGE)
    assert set(FORMS) <= set(rows) and all(len(row) == COLUMNS for row in rows.values())
    probes = []
    for name, row in rows.items():
        config = load_config([*OVERRIDES, *words(row[-1])])
        check_values(config)
        check_experts(config, Layout.for_world(1))
        assert name == config.mome.expert or name not in FORMS
        count = mome_parameters(load_config(["experiment=lrs3", *words(row[-1])]), HIDDEN, 1)
        assert row[3] == f"{count.total:,} ({count.active:,})", name
        assert (f"{config.mome.bottleneck} numbers" in row[4]) == bool(find_form(config.mome.expert).common)
        probes.append(Probe(shrunk(config, tmp_path / name), 2))
    for name, losses in zip(rows, run_world(losses_of, 1, probes)[0], strict=True):
        assert len(losses) == 2 and all(map(math.isfinite, losses)), name
