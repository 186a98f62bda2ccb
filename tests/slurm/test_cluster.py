"""The test cluster itself: it is whole, private to its process, and gone with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.patience import patience
from tests.slurm import packages
from tests.slurm.cluster import Cluster
from tests.slurm.desk import ROOT

pytestmark = pytest.mark.slurm

DAEMONS = {"munged", "mariadbd", "slurmctld", "slurmdbd", "slurmd", "slurmstepd"}


def daemons() -> dict[int, str]:
    """Slurm's processes on this machine, in any namespace."""
    found = {
        process.pid: process.info["name"]
        for process in psutil.process_iter(["name", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE
    }
    return {pid: name for pid, name in found.items() if name in DAEMONS}


def test_it_is_a_cluster_of_several_nodes(slurm: Cluster) -> None:
    told = slurm.run(["srun", "--nodes=2", "--ntasks-per-node=2", "hostname"]).stdout.split()
    assert len(told) == 4 and len(set(told)) == 2
    assert not Path("/run/cluster").exists(), "its files are not this machine's"


def test_what_a_test_leaves_is_named_and_put_right(slurm: Cluster) -> None:
    wait = ["sbatch", "--parsable", "--output=/dev/null"]
    held = slurm.run([*wait, "--hold", "--wrap=true"]).stdout.strip()
    running = slurm.run([*wait, "--nodelist=node1", "--wrap=sleep 3600"]).stdout.strip()
    slurm.run(["scontrol", "update", "NodeName=node4", "State=DRAIN", "Reason=test"])
    slurm.kill_node(3)
    left = slurm.tidy()
    assert {f"job {held} (wrap) is PENDING (JobHeldUser)", "node4 is drained", "node3 has no power"} <= set(left)
    assert f"job {running} (wrap) is RUNNING (None)" in left
    slurm.kill_controller()
    assert "the controller is away" in slurm.tidy()
    assert slurm.tidy() == [] and slurm.idle_nodes() == slurm.nodes


def test_nothing_is_left_when_its_process_is_killed() -> None:
    before = daemons()
    command = [sys.executable, "-m", "tests.slurm.cluster", "--nodes=1"]
    # A job that would go on for an hour, and a word when it runs.
    script = "srun --overlap sh -c 'echo running; exec sleep 3600'"
    owner = subprocess.Popen([*command, "bash", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "running\n"
    started = {pid: name for pid, name in daemons().items() if pid not in before}
    assert set(started.values()) == DAEMONS
    everything = {process.pid for process in psutil.Process(owner.pid).children(recursive=True)}
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    ending = [psutil.Process(pid) for pid in {*started, *everything} if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(ending, patience(10))
    assert not alive, alive


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match=r"needs root.*PYTEST_ARGS='-m \"not slurm\"'"):
        packages.install()


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path, slurm: Cluster) -> None:
    done = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
