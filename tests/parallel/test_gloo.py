"""All groups of a rank wait for messages in one thread, whichever interfaces they go over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from tests.parallel.worlds import run_world


def _groups_threads_and_sums(layout: Layout) -> tuple[int, int, list[float]]:
    """How many groups of more than one rank this rank is in, its threads that wait, and a sum over each group."""
    with parallel_world(layout, 0, 60):
        groups = [group for group in dist.distributed_c10d._world.pg_map if group.size() > 1]
        numbers = [torch.tensor([float(1 + dist.get_rank())]) for _ in groups]
        for group, number in zip(groups, numbers, strict=True):
            dist.all_reduce(number, group=group)
        names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return len(groups), names.count("gloo_tcp_loop"), [number.item() for number in numbers]


@pytest.mark.parametrize("interfaces", [None, "lo"])
def test_a_rank_has_one_thread_for_all_its_groups(interfaces: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if interfaces is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    else:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interfaces)
    for groups, threads, sums in run_world(_groups_threads_and_sums, 2, Layout.for_world(2, ep=2)):
        assert groups > 5 and threads == 1
        assert sums == [3.0] * groups
