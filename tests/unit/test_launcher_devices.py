"""What ranks get of a machine: GPUs as the driver shows them, cores near them, threads, and a backend."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mome_dist.errors import UserError
from mome_dist.launchers.environment import Machine, own_cores
from mome_dist.launchers.gpus import DRIVERS, ask_driver, near_cores, parse_cores, visible_gpus
from mome_dist.launchers.ranks import RankGroup
from mome_dist.launchers.slurm.rank import become_task, machine_of
from mome_dist.parallel.backend import asked_backend, place

TASK = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3"}
ADDRESSES = [f"0000:{number:02x}:00.0" for number in (0x17, 0x3D, 0x9B, 0xDA)]


class Driver:
    """Stands for the driver's library, which answers as NVIDIA's does on a machine with some GPUs."""

    def __init__(self, addresses: list[str], begin: int = 0) -> None:
        self.addresses, self.begin = addresses, begin

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self.begin

    def cuDeviceGetCount(self, pointer: Any) -> int:
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = len(self.addresses)
        return 0

    def cuDeviceGetPCIBusId(self, text: Any, size: int, device: int) -> int:
        assert size > len(self.addresses[device])
        text.value = self.addresses[device].encode()
        return 0


def test_the_driver_is_asked_for_what_it_shows() -> None:
    names = DRIVERS["cuda"][1:]
    assert ask_driver(Driver(["0000:17:00.0", "0000:3D:00.0"]), names) == ["0000:17:00.0", "0000:3d:00.0"]
    assert ask_driver(Driver(["0000:17:00.0"], begin=100), names) == []  # no device for this process


def test_this_machine_answers() -> None:
    assert visible_gpus({**os.environ, "CUDA_VISIBLE_DEVICES": ""}) == []


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    """Files of a machine with two NUMA nodes of eight cores, and two GPUs at each."""
    for number, address in enumerate(ADDRESSES):
        folder = tmp_path / "bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{number // 2}\n")
        (folder / "local_cpulist").write_text("0-3,8-11\n" if number < 2 else "4-7,12-15\n")
    return tmp_path


def test_cores_near_a_gpu(devices: Path) -> None:
    assert near_cores(ADDRESSES[2], devices) == {4, 5, 6, 7, 12, 13, 14, 15}
    assert near_cores("0000:ff:00.0", devices) is None
    (devices / "bus/pci/devices" / ADDRESSES[0] / "numa_node").write_text("-1\n")  # the machine does not say
    assert near_cores(ADDRESSES[0], devices) is None
    assert parse_cores("5\n") == {5}


def machine(devices: Path, ranks: int, cores: range, allotted: int, gpus: list[str]) -> Machine:
    return Machine(ranks, frozenset(cores), allotted, gpus, devices)


def test_ranks_run_near_their_gpus(devices: Path) -> None:
    whole = machine(devices, 4, range(16), 16, ADDRESSES)
    assert [sorted(whole.cores_of(rank))[:2] for rank in range(4)] == [[0, 1], [0, 1], [4, 5], [4, 5]]
    assert whole.threads == 4  # two ranks share eight cores


def test_ranks_are_left_where_they_are_if_that_is_all_one_can_say(devices: Path) -> None:
    bound = machine(devices, 4, range(4), 16, ADDRESSES)  # by Slurm, to cores of another NUMA node
    assert bound.cores_of(3) == frozenset(range(4))
    for gpus in ([], ADDRESSES[:1], ["0000:ff:00.0"] * 4):  # none; one that all share; unknown ones
        assert machine(devices, 4, range(16), 16, gpus).cores_of(1) == frozenset(range(16))
    # All GPUs at one NUMA node: beside them each rank would have two cores, not four.
    assert machine(devices, 4, range(16), 16, [*ADDRESSES[:2]] * 2).cores_of(0) == frozenset(range(16))
    # A container with cores of the other node only.
    assert machine(devices, 2, range(4, 8), 4, ADDRESSES[:2]).cores_of(0) == frozenset(range(4, 8))


@pytest.mark.parametrize(
    ("ranks", "cores", "allotted", "threads"),
    [
        (8, 16, 128, 16),  # 8 tasks of 16 cores, each bound by Slurm to its own
        (8, 128, 128, 16),  # not bound: all run on all cores
        (8, 64, 128, 16),  # bound to sockets, four tasks each
        (8, 256, 128, 16),  # half of a node, without cgroups
        (4, 2, 2, 1),
        (1, 6, 6, 6),
    ],
)
def test_threads_are_a_share_of_the_cores_once(ranks: int, cores: int, allotted: int, threads: int) -> None:
    assert Machine(ranks, frozenset(range(cores)), allotted).threads == threads


def test_a_task_that_slurm_has_bound_uses_its_cores() -> None:
    mine = len(own_cores())
    task = {**TASK, "SLURM_CPUS_ON_NODE": str(8 * mine)}
    assert become_task(task)["OMP_NUM_THREADS"] == str(mine)
    assert machine_of(TASK).threads == max(1, mine // 8)  # Slurm says nothing: all may run on the same


def test_a_rank_runs_on_the_cores_that_it_is_given(tmp_path: Path) -> None:
    before, one = own_cores(), frozenset(sorted(own_cores())[-1:])
    say = "import os; print(sorted(os.sched_getaffinity(0)), flush=True)"
    with RankGroup() as group:
        logs = [tmp_path / "1.log", tmp_path / "2.log"]
        group.start([sys.executable, "-c", say], [dict(os.environ)] * 3, logs, [before, one, before])
        assert group.wait(30).code == 0
    assert [json.loads(log.read_text()) for log in logs] == [sorted(one), sorted(before)]
    assert own_cores() == before


def test_nccl_has_a_gpu_for_each_rank_and_gloo_shares() -> None:
    assert place(0, 0, None) == ("cpu", "gloo")
    assert place(3, 8, None) == ("cuda:3", "nccl")
    assert [place(rank, 1, "gloo") for rank in (0, 1)] == [("cuda:0", "gloo")] * 2
    assert place(5, 4, "gloo") == ("cuda:1", "gloo")
    with pytest.raises(UserError, match=r"rank 1 of this node sees 1 GPUs .*MOME_DIST_BACKEND=gloo"):
        place(1, 1, None)
    with pytest.raises(UserError, match="rank 0 of this node sees 0 GPUs"):
        place(0, 0, "nccl")
    assert asked_backend({}) is asked_backend({"MOME_DIST_BACKEND": ""}) is None
    with pytest.raises(UserError, match="MOME_DIST_BACKEND=mpi: choose nccl or gloo"):
        asked_backend({"MOME_DIST_BACKEND": "mpi"})
