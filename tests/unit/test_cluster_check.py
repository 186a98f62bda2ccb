"""What the cluster check makes of reports, pairs and groups; the measurement itself is in tests/parallel."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mome_dist.cluster import rates
from mome_dist.cluster.check import Limits, find_problems
from mome_dist.cluster.links import groups_of, pairs_of


def _report(node: str) -> dict[str, Any]:
    return {
        "node": node,
        "software": {"torch": "2.13.0"},
        "hardware": {"gpu": "H100", "gpus": 8},
        "code": "/code",
        "executable": "/python",
        "memory_bytes": 80e9,
        "clock_seconds": 0.0,
        "sees_shared": True,
        "rates": {"bf16_flops": 5e14, "memory_bytes": 3e12},
    }


REPORTS = [_report(node) for node in "aabbcc"]
LINKS = {"inside": {"pairs": [{"ranks": [i, i + 1], "bytes_per_second": 4e11} for i in (0, 2, 4)]}}


def _problems(reports: list[dict[str, Any]], links: dict[str, Any] = LINKS) -> list[str]:
    return list(find_problems(reports, links, Path("/shared"), Limits()))


def test_equal_nodes_have_no_problems() -> None:
    assert _problems(REPORTS) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["software"].update(torch="2.12.0"), "node b has torch 2.12.0, the others have 2.13.0"),
        (lambda r: r["hardware"].update(gpus=7), "node b has gpus 7, the others have 8"),
        (lambda r: r.update(clock_seconds=-2.5), "node b's clock is 2.50 s behind"),
        (lambda r: r.update(sees_shared=False), "node b does not see a file that rank 0 wrote to /shared"),
        (lambda r: r["rates"].update(bf16_flops=2e14), "node b reaches 40% of the usual bf16_flops"),
    ],
)
def test_what_differs_is_named(change: Any, words: str) -> None:
    reports = copy.deepcopy(REPORTS)
    for report in reports[2:4]:
        change(report)
    (problem,) = _problems(reports)
    assert words in problem


def test_an_uneven_number_of_ranks_is_named() -> None:
    (problem,) = _problems(REPORTS[:5])
    assert problem.startswith("node c has 1 ranks, most nodes have 2")


def test_a_slow_link_is_named() -> None:
    links = copy.deepcopy(LINKS)
    links["inside"]["pairs"][1]["bytes_per_second"] = 1e11
    (problem,) = _problems(REPORTS, links)
    assert "between rank 2 (node b) and rank 3 (node b) is slow" in problem


def test_pairs_of_a_turn_share_no_rank_and_cover_all_neighbours() -> None:
    nodes = [node for node in "abc" for _ in range(4)]
    pairs = pairs_of(nodes)
    for turns in pairs.values():
        for turn in turns:
            ranks = [rank for pair in turn for rank in pair]
            assert len(ranks) == len(set(ranks))
    assert sorted(pair for turn in pairs["inside"] for pair in turn) == [
        (first + i, first + i + 1) for first in (0, 4, 8) for i in range(3)
    ]
    assert sorted(pair for turn in pairs["between"] for pair in turn) == [(0, 4), (0, 8), (4, 8)]


def test_groups_are_nodes_and_equal_places_of_nodes() -> None:
    assert groups_of(["a", "a", "b", "b"]) == {"inside": [[0, 1], [2, 3]], "between": [[0, 2], [1, 3]]}
    assert groups_of(["a"]) == {}


def test_a_gpu_is_asked_for_no_more_than_a_moment_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches that return at once, as a GPU's do; the work is done when somebody waits for it."""
    each, queued, longest = 0.004, 0, 0

    def launch() -> None:
        nonlocal queued
        queued += 1

    def synchronize(_: torch.device) -> None:
        nonlocal queued, longest
        longest = max(longest, queued)
        time.sleep(each * min(queued, 1000))
        queued = 0

    monkeypatch.setattr(rates, "synchronize", synchronize)
    assert rates.best_seconds(launch, torch.device("cuda")) == pytest.approx(each, rel=0.5)
    assert 1 < longest <= rates.SHORTEST_TIMING / each + 1
