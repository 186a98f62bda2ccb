"""docs/routers.md: a row for every router of the registry, whose command trains."""

from __future__ import annotations

import math
from pathlib import Path

from mome_dist.config import load_config
from mome_dist.config.derived import router_of
from mome_dist.config.values import check_values
from mome_dist.moe.routers.registry import ROUTERS
from mome_dist.parallel.layout import Layout
from mome_dist.preflight import check_experts
from mome_dist.verification.probe import Probe, shrunk
from tests.parallel.worlds import run_world
from tests.probes import OVERRIDES
from tests.tables import losses_of, rows_of, words

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/routers.md").read_text()
COLUMNS = 7


def test_every_router_has_a_row_that_trains(tmp_path: Path) -> None:
    rows = rows_of(PAGE)
    assert set(rows) == set(ROUTERS) and all(len(row) == COLUMNS for row in rows.values())
    probes = []
    for name, row in rows.items():
        command = words(row[-1])
        assert command[0] == f"mome/router={name}"
        config = load_config([*OVERRIDES, "mome.routed_experts=24", *command])
        check_values(config)
        check_experts(config, Layout.for_world(1))
        settings = router_of(config).settings
        assert (row[4] == "yes") == settings.batch_invariant
        assert ("parallel.ep=1" in row[3]) == (settings.dispatches == ("local",))
        unequal = config.mome.top_k > load_config([*OVERRIDES]).mome.top_k
        assert ("mome.top_k" in row[3]) == unequal
        probes.append(Probe(shrunk(config, tmp_path / name), 2))
    for name, losses in zip(rows, run_world(losses_of, 1, probes)[0], strict=True):
        assert len(losses) == 2 and all(map(math.isfinite, losses)), name
