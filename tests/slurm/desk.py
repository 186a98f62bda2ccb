"""A user's desk on the test cluster: submitting jobs, waiting for them, and reading what they left."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from mome_dist.launchers.slurm import tries
from tests.parallel.runs import Lab, without_experts
from tests.patience import patience
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
# Test settings that a user's session does not have. (OMP_NUM_THREADS stays: sums depend on the number of threads.)
_NOT_THE_USERS = ("GLOO_SOCKET_IFNAME", "HF_DEACTIVATE_ASYNC_LOAD", "HF_HUB_OFFLINE", "OMP_WAIT_POLICY")


@dataclass(frozen=True)
class Desk:
    """A checkout (``folder``) on the cluster's shared file system, and small models to train."""

    cluster: Cluster
    lab: Lab
    folder: Path

    @classmethod
    def set_up(cls, cluster: Cluster, lab: Lab, folder: Path) -> Desk:
        """Lay out the checkout."""
        for name in ("launchers", "configs", "slurm", "mome_dist", "tools"):
            (folder / name).symlink_to(ROOT / name)
        return cls(cluster, lab, folder)

    def environment(self) -> dict[str, str]:
        """What a user's session has: this Python, the caches, and none of the test's own variables."""
        mine = {"PYTHONPATH": str(ROOT), "MOME_DIST_CACHE": str(self.lab.cache), "MOME_DIST_PYTHON": sys.executable}
        return {**{name: value for name, value in os.environ.items() if name not in _NOT_THE_USERS}, **mine}

    def run(self, arguments: Sequence[str], timeout: float = 60, check: bool = True) -> CompletedProcess[str]:
        """Run a command on the login node, ``python`` being this one; ``timeout`` is that of an idle machine."""
        words = [sys.executable if word == "python" else word for word in arguments]
        return self.cluster.run(words, check, environment=self.environment(), cwd=self.folder, timeout=timeout)

    def small(self, name: str, *more: str) -> list[str]:
        """Arguments that make a run ``runs/NAME`` of any experiment small, with our models and corpus."""
        usual = [
            "llm=tiny",
            *(() if without_experts(more) else ("mome.dispatch=alltoall",)),
            "audio_encoder.padding=clip",
            "task.views_per_step=2",
            "data.decode_threads=1",
            f"name={name}",
        ]
        return self.lab.overrides(self.folder / "runs" / name, *usual, *more)[1:]

    def reference(self, name: str, *more: str, world: int = 1, **sizes: int) -> list[float]:
        """Losses of the same training of experiment lrs3 in forked processes on this machine, without Slurm."""
        lab = replace(self.lab, experiment="lrs3")
        arguments = self.small(name, *more)
        return lab.train(world, self.folder / "runs" / name, *arguments, **sizes, timeout=patience(120))

    def processes(self, node: int) -> list[str]:
        """Ranks that run on a node."""
        return self.cluster.run(["pgrep", "-f", "--", "-m mome_dist.train"], check=False, node=node).stdout.split()

    def submit(self, name: str, options: Sequence[str], *more: str) -> Job:
        """sbatch slurm/train_lrs3.sh for the run ``runs/NAME``."""
        # Two cores a rank and one thread that decodes, so that several jobs find room.
        told = self.run(
            ["sbatch", "--parsable", "--cpus-per-task=2", *options, "slurm/train_lrs3.sh", *self.small(name, *more)]
        )
        return Job(self, told.stdout.strip(), self.folder / "runs" / name)


@dataclass(frozen=True)
class Job:
    """A submitted job and its run directory."""

    desk: Desk
    id: str
    run: Path

    def show(self) -> dict[str, str]:
        """What the controller says of it."""
        told = self.desk.cluster.run(["scontrol", "--oneliner", "show", "job", self.id]).stdout
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    def accounted(self, starts: int = 1) -> list[str]:
        """States of its starts (or array tasks) in the accounting, oldest first, once there are so many and all have
        ended: the accounting hears of an end after those who wait for the job."""

        def states() -> list[str]:
            told = self.desk.cluster.run(["sacct", "-D", "-X", "-n", "-P", "--format=State", "-j", self.id]).stdout
            return [line.split()[0] for line in told.splitlines() if line]

        def ended() -> bool:
            found = states()
            return len(found) >= starts and not {"PENDING", "RUNNING"} & set(found)

        self.wait(ended, 30, f"end of {starts} starts in the accounting")
        return states()

    def saved_step(self) -> int:
        """The newest step that it has saved."""
        return max((int(p.name[5:]) for p in (self.run / "checkpoints").glob("step-*")), default=0)

    def steps(self) -> list[dict[str, Any]]:
        """What it has logged of its steps so far."""
        path = self.run / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""  # the last line may be half written
        return [line for line in map(json.loads, whole.splitlines()) if "loss" in line]

    def losses(self) -> list[float]:
        """Its loss curve, one number a step."""
        steps = self.steps()
        assert [line["step"] for line in steps] == list(range(1, len(steps) + 1)), "steps are missing or repeated"
        return [line["loss"] for line in steps]

    def summary(self) -> dict[str, Any]:
        """Its summary.json."""
        return json.loads((self.run / "slurm" / self.id / "summary.json").read_text())

    def output(self) -> str:
        """What the job itself said."""
        path = self.desk.folder / f"slurm-{self.id}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> None:
        """Wait for something about this job that takes up to ``seconds`` on an idle machine."""
        deadline = time.monotonic() + patience(seconds)
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(
                    f"--- {path}\n{path.read_text(errors='replace')[-1500:]}\n" for path in self.run.rglob("rank-*.log")
                )
                known = self.show()
                held = tries.why_held(known)
                why = f", held ({held}) until `{tries.release_command(self.id)}`" if held else ""
                raise AssertionError(
                    f"job {self.id}{why}: no {what} after {patience(seconds):.0f} s\n{known}\n{self.output()}\n{logs}"
                )
            time.sleep(0.25)

    def wait_for(self, *states: str, seconds: float = 120) -> str:
        """Wait until it is in one of the states; return it."""
        self.wait(lambda: self.state in states, seconds, f"state {' or '.join(states)}")
        return self.state

    def wait_for_end(self, seconds: float = 150) -> str:
        """Wait until it has ended for good; return its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        return self.wait_for(*ended, seconds=seconds)

    def wait_for_step(self, step: int, seconds: float = 90) -> None:
        """Wait until it has saved this step."""
        self.wait(lambda: self.saved_step() >= step, seconds, f"checkpoint of step {step}")

    def nodes(self) -> list[str]:
        """Its nodes, rank 0's first."""
        return self.summary()["tries"][-1]["nodes"]

    def kill_rank(self, node: str) -> None:
        """Kill its rank on a node, which runs no other job, with SIGKILL."""
        self.desk.cluster.run(["pkill", "-KILL", "-f", "--", "-m mome_dist.train"], node=int(node.removeprefix("node")))
