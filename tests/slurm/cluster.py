"""A real Slurm cluster on this machine: ``python -m tests.slurm.cluster`` opens a shell in one.

munge, slurmctld, slurmdbd (with its database) and a slurmd on each node, from Debian's packages. The cluster lives in
namespaces of its own (network, mounts, processes, host name), and each node in further ones, so that

- nothing on this machine changes: /etc/slurm, /run, /etc/hosts and the network interfaces are private copies;
- killing a node kills all that runs on it at once, as when a machine loses power;
- nothing survives the end of the process that started it, not even its SIGKILL: the kernel ends a process namespace
  with its first process, which dies with us.

CPUs, memory and GPUs are pretended; files are shared with this machine, /dev/shm is each node's own.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from mome_dist.cli import main_guard
from tests.patience import patience
from tests.slurm import packages, settings
from tests.slurm.settings import STATE, node_name

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_DATABASE = ("--no-defaults", "--user=root")
_FAST = (
    *(f"--socket={STATE}/database.sock", "--bind-address=127.0.0.1", "--skip-log-bin", "--performance-schema=0"),
    *("--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"),
)

# The first process of the cluster: prepares what is private, then only reaps orphans (bash does that as process 1).
_CLUSTER_INIT = """\
set -e
hostname {controller}
ip link set lo up
ip link add bridge0 type bridge
ip addr add {address}/24 dev bridge0
ip link set bridge0 up
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p -m 755 {state} /run/munge {state}/controller
for gpu in $(seq 0 {last_gpu}); do mknod "{state}/gpu$gpu" c 1 3; done
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf
mount --bind {folder}/etc-slurm /etc/slurm
echo ready
sleep infinity & wait
"""

# The first process of a node: its network card is moved in from outside; the node lives as long as its slurmd.
_NODE_INIT = """\
set -e
hostname {name}
mount -t tmpfs tmpfs /dev/shm
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip addr add {address}/24 dev eth0
ip link set eth0 up
mkdir -p {state}/spool-{name}
slurmd -D -N {name} & wait $!
"""


class Cluster:
    """A running cluster; use `cluster` to get one.

    Attributes:
        nodes: how many.
        folder: of logs and settings.
    """

    def __init__(self, nodes: int, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._init = 0

    def start(self) -> None:
        """Start everything and wait until all nodes are idle; takes about five seconds."""
        packages.install()
        (self.folder / "logs").mkdir(parents=True)
        settings.write_etc(self.folder / "etc-slurm", self.nodes)
        (self.folder / "hosts").write_text(settings.hosts(self.nodes))
        # No name server can be reached, and asking one costs seconds.
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        self._start_namespaces()
        self._start("munged", ["munged", "--foreground", "--force", f"--key-file={self._munge_key()}"])
        self._wait(lambda: self.run(["munge", "-n"], check=False).returncode == 0, "munged")
        self._start_database()
        self._start("slurmdbd", ["slurmdbd", "-D"])
        self._wait(lambda: self.run(["sacctmgr", "-n", "show", "cluster"], check=False).returncode == 0, "slurmdbd")
        self.run(["sacctmgr", "--immediate", "add", "cluster", "test"])
        self.start_controller()
        for number in range(1, self.nodes + 1):
            self.start_node(number)
        self._wait(lambda: self.idle_nodes() == self.nodes, "nodes", 60)

    def stop(self) -> None:
        """End every process of the cluster at once."""
        if self._init:
            os.kill(self._init, signal.SIGKILL)
        else:
            for process in self._processes.values():
                process.kill()
        for process in self._processes.values():
            process.wait(timeout=patience(30))  # process 1 of a namespace is gone only after all others in it

    def inside(self, command: Sequence[str], node: int | None = None, cwd: Path | None = None) -> list[str]:
        """The command that runs ``command`` on the controller's host, or on a node."""
        target = self._init if node is None else self._node_init(node)
        entered = ["nsenter", f"--target={target}", "--net", "--uts", "--mount", "--pid"]
        return [*entered, f"--wdns={cwd or Path.cwd()}", "--", *command]

    def run(
        self,
        command: Sequence[str],
        check: bool = True,
        node: int | None = None,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the cluster and return what it said; ``timeout`` is that of an idle machine."""
        done = subprocess.run(
            self.inside(command, node, cwd),
            env=environment,
            capture_output=True,
            text=True,
            timeout=patience(timeout),
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers."""
        self._start("slurmctld", ["slurmctld", "-D"])
        self._wait(lambda: self.run(["scontrol", "ping"], check=False).returncode == 0, "slurmctld")

    def kill_controller(self) -> None:
        """Kill slurmctld with SIGKILL."""
        self._kill("slurmctld")

    def start_node(self, number: int) -> None:
        """Boot a node; it registers with the controller within seconds."""
        name, address = node_name(number), settings.node_address(number)
        script = _NODE_INIT.format(name=name, address=address, state=STATE)
        self._start(name, ["unshare", *_NAMESPACES, "bash", "-c", script])
        self._wait(lambda: self._node_init(number) > 0, name)
        link = f"ip link add veth{number} type veth peer name eth0 netns {self._node_init(number)}"
        # In our own process namespace, where the node's number is the one we know.
        entered = ["nsenter", f"--target={self._init}", "--net", "--"]
        for command in (link, f"ip link set veth{number} master bridge0 up"):
            subprocess.run([*entered, *command.split()], check=True, timeout=patience(10))
        # slurmd's port: until then the controller of a node that was away for moments only still takes it for well.
        knock = ["bash", "-c", f"exec 3<>/dev/tcp/{address}/6818"]
        self._wait(lambda: self.run(knock, check=False).returncode == 0, f"slurmd on {name}")

    def kill_node(self, number: int) -> None:
        """Take a node's power away: every process on it is gone at once, and its network card."""
        os.kill(self._node_init(number), signal.SIGKILL)
        self._processes.pop(node_name(number)).wait()

    def idle_nodes(self) -> int:
        """How many nodes are idle."""
        return sum(state == "idle" for state in self._node_states().values())

    def tidy(self) -> list[str]:
        """Bring the cluster back to where every test finds it: controller and nodes up, no jobs.

        Returns:
            what was left in another state; nothing of what ends by itself within seconds.
        """
        away = [] if "slurmctld" in self._processes else ["the controller is away"]
        if away:
            self.start_controller()
        deadline = time.monotonic() + patience(5)
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.5)
        if jobs := self.run(["squeue", "-h", "-o", "%A"]).stdout.split():
            self.run(["scancel", *jobs])
        for number in self._dead_nodes():
            self.start_node(number)
        self._wait(lambda: not self.run(["squeue", "-h"]).stdout, "end of cancelled jobs", 60)
        self.resume_nodes()
        self._wait(lambda: not self._left(), "rest", 60)
        return away + left

    def resume_nodes(self) -> list[str]:
        """Bring back nodes that are down or drained, as an operator does; return their names."""
        names = [name for name, state in self._node_states().items() if state.startswith(("down", "drain"))]
        for name in names:
            self.run(["scontrol", "update", f"NodeName={name}", "State=RESUME"])
        return names

    def _left(self) -> list[str]:
        """What is not as every test finds it."""
        jobs = self.run(["squeue", "-h", "-o", "job %i (%j) is %T (%r)"]).stdout.splitlines()
        nodes = [f"{name} is {state}" for name, state in self._node_states().items() if state != "idle"]
        return [*jobs, *nodes, *(f"{node_name(number)} has no power" for number in self._dead_nodes())]

    def _dead_nodes(self) -> list[int]:
        return [number for number in range(1, self.nodes + 1) if node_name(number) not in self._processes]

    def _node_states(self) -> dict[str, str]:
        told = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"], check=False).stdout
        return dict(line.split() for line in told.splitlines())

    def _start_namespaces(self) -> None:
        script = _CLUSTER_INIT.format(
            controller=settings.CONTROLLER,
            address=settings.controller_address(),
            state=STATE,
            last_gpu=settings.GPUS - 1,
            folder=self.folder,
        )
        command = ["unshare", "--propagation=private", *_NAMESPACES, "bash", "-c", script]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log("namespaces"), preexec_fn=_die_with_parent
        )
        self._processes["namespaces"] = process
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(
                "This machine does not let us make namespaces for a Slurm cluster: "
                f"{(self.folder / 'logs/namespaces.log').read_text()}\n{packages.HOW_TO_LEAVE_OUT}"
            )
        self._init = psutil.Process(process.pid).children()[0].pid

    def _munge_key(self) -> Path:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        return key

    def _start_database(self) -> None:
        data = STATE / "database"
        self.run(["mariadb-install-db", *_DATABASE, f"--datadir={data}", "--auth-root-authentication-method=normal"])
        accounts = self.folder / "accounts.sql"
        accounts.write_text(settings.DATABASE_ACCOUNTS)
        self._start(
            "mariadbd",
            ["mariadbd", *_DATABASE, *_FAST, f"--datadir={data}", f"--init-file={accounts}"],
        )
        ask = ["mariadb", "--no-defaults", "-h127.0.0.1", "-uslurm", "-pslurm", "-e", "SELECT 1", "slurm"]
        self._wait(lambda: self.run(ask, check=False).returncode == 0, "mariadbd")

    def _start(self, name: str, command: Sequence[str]) -> None:
        log = self._log(name)
        self._processes[name] = subprocess.Popen(
            self.inside(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_plain_environment()
        )

    def _log(self, name: str) -> int:
        return os.open(self.folder / f"logs/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def _kill(self, name: str) -> None:
        process = self._processes.pop(name)
        for child in psutil.Process(process.pid).children(recursive=True):  # nsenter waits for the daemon
            with suppress(psutil.NoSuchProcess):  # the daemon's own helpers come and go
                child.kill()
        process.wait()

    def _node_init(self, number: int) -> int:
        """Process 1 of a node, by our own numbers; 0 while there is none. nsenter -> unshare -> bash."""
        process = psutil.Process(self._processes[node_name(number)].pid)
        for _ in range(2):
            children = process.children()
            if not children:
                return 0
            process = children[0]
        return process.pid

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + patience(seconds)
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(
                    f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}\n"
                    for path in sorted((self.folder / "logs").glob("*.log"))
                )
                raise RuntimeError(f"the Slurm cluster: no {what} after {patience(seconds):.0f} s\n{logs}")
            time.sleep(0.1)


@contextmanager
def cluster(nodes: int, folder: Path) -> Iterator[Cluster]:
    """A cluster that runs as long as the block does.

    Raises:
        RuntimeError: it cannot be started; says why and how to leave these tests out.
    """
    running = Cluster(nodes, folder)
    try:
        running.start()
        yield running
    finally:
        running.stop()


def _plain_environment() -> dict[str, str]:
    """What a daemon needs; jobs get their environment from whoever submits them."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": os.environ.get("HOME", "/root")}


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@main_guard
def main() -> int:
    """Open a shell in a cluster, or run a command there; both end with the cluster."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description=main.__doc__)
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="how many nodes (default: 3)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run (default: a shell)")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="mome_dist-cluster-") as folder,
        cluster(options.nodes, Path(folder) / "c") as it,
    ):
        return subprocess.run(it.inside(options.command or ["bash"]), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
