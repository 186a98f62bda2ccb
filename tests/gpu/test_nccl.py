"""A GPU for each rank, over NCCL: every kind of exchange that training uses, and layouts against one process.

    python tools/gpu_suite.py --only nccl

needs two GPUs of one machine or more, of which it uses 2 or 4. On a CPU the same code goes over gloo; with one GPU it
fails, for it would show nothing. docs/gpu.md says what to report.
"""

from __future__ import annotations

import socket
import statistics
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist

from benchmarks.measuring import interleaved
from mome_dist.moe.dispatch.exchange import all_to_all
from mome_dist.parallel.backend import GLOO, NCCL
from mome_dist.parallel.device import current_device
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.verification.probe import Probe
from tests.gpu.conftest import Record
from tests.gpu.test_layouts import BY_WORLD, ON_A_CPU, named
from tests.gpu.worlds import assert_equal, compare_layouts, run_ranks

pytestmark = pytest.mark.gpu

LARGE = {"cpu": 1 << 12, "cuda": 1 << 28}  # numbers of a tensor whose exchange is timed
ROUNDS = 10


@dataclass
class Seen:
    """What a rank saw.

    Attributes:
        backend, device, host: of the rank.
        wrong: names of exchanges with a wrong result.
        gigabytes_per_second: of an all-reduce of a large tensor, as every rank's link has to carry it.
    """

    backend: str
    device: str
    host: str
    gigabytes_per_second: float
    wrong: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def world(device: torch.device) -> int:
    """Ranks: 4 where there are as many GPUs, 2 otherwise."""
    gpus = 2 if device.type == "cpu" else torch.cuda.device_count()
    assert gpus >= 2, f"NCCL needs a GPU for each rank, and at least 2; this machine has {gpus}"
    return 4 if gpus >= 4 else 2


def _exchanges(world: int) -> Seen:
    with parallel_world(Layout.for_world(world), 0, timeout_seconds=60):
        rank, device = dist.get_rank(), current_device()
        large = torch.ones(LARGE[device.type], device=device)
        (timings,) = interleaved({"": lambda: dist.all_reduce(large, op=dist.ReduceOp.MAX)}, ROUNDS, device).values()
        seconds = statistics.median(each.device for each in timings)
        rate = 2 * (world - 1) / world * large.numel() * large.element_size() / seconds / 1e9
        seen = Seen(dist.get_backend(), str(device), socket.gethostname(), rate)

        def check(name: str, found: torch.Tensor, expected: list[float]) -> None:
            if found.flatten().tolist() != expected:
                seen.wrong.append(f"{name}: {found.flatten().tolist()} instead of {expected}")

        mine = torch.full((2,), float(rank), device=device)
        summed = mine.clone()
        dist.all_reduce(summed)
        check("all-reduce", summed, [world * (world - 1) / 2] * 2)
        gathered = torch.empty(2 * world, device=device)
        dist.all_gather_into_tensor(gathered, mine)
        check("all-gather", gathered, [float(other) for other in range(world) for _ in range(2)])
        share = torch.empty(1, device=device)
        dist.reduce_scatter_tensor(share, torch.arange(float(world), device=device))
        check("reduce-scatter", share, [float(world * rank)])
        sent = torch.full((2,), float(rank), device=device)
        dist.broadcast(sent, src=world - 1)
        check("broadcast", sent, [float(world - 1)] * 2)
        # Every rank sends rank r as many rows as r + 1.
        sizes, own = [other + 1 for other in range(world)], [rank + 1] * world
        everybody = dist.group.WORLD
        assert everybody is not None
        exchange = all_to_all(everybody, sizes, own)
        exchange.start(torch.full((sum(sizes), 1), float(rank), device=device))
        check(
            "all-to-all of unequal parts", exchange.finish(), [float(r) for r in range(world) for _ in range(rank + 1)]
        )
        received = torch.empty(2, device=device)
        for work in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, mine, (rank + 1) % world),
                dist.P2POp(dist.irecv, received, (rank - 1) % world),
            ]
        ):
            work.wait()
        check("from the rank before", received, [float((rank - 1) % world)] * 2)
        return seen


def test_every_exchange(device: torch.device, world: int, record: Record) -> None:
    ranks = run_ranks(device, _exchanges, world, world)
    record(world=world, exchanges=[vars(seen) for seen in ranks])
    assert [seen.wrong for seen in ranks] == [[]] * world
    assert {seen.backend for seen in ranks} == {GLOO if device.type == "cpu" else NCCL}
    if device.type == "cuda":
        assert len({seen.device for seen in ranks}) == world, "ranks share a GPU"


def test_layouts_equal_one_process(device: torch.device, probe: Probe, world: int, record: Record) -> None:
    names = (ON_A_CPU if device.type == "cpu" else BY_WORLD)[world]
    comparisons = compare_layouts(device, probe, named(*names), "adamw", backend=NCCL)
    record(layout_errors={name: each.errors for name, each in comparisons.items()})
    assert_equal(comparisons)
