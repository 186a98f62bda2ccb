"""A look at every node before any rank starts: same software, shared output, enough devices.

Each node prints one line of JSON (``python -m mome_dist.launchers.slurm.preflight``, started by srun); the first node
compares them. It takes a second, and saves the minutes in which a world waits for a rank that cannot come.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mome_dist
from mome_dist.errors import UserError
from mome_dist.launchers.gpus import visible_gpus
from mome_dist.launchers.slurm.steps import Steps
from mome_dist.parallel.backend import GLOO, SHARING_ADVICE, asked_backend
from mome_dist.versions import version_of

_TIMEOUT_SECONDS = 120
_PACKAGES = ("mome_dist", "torch", "megatron-core", "deepspeed")
_SAME_EVERYWHERE = ("python", *_PACKAGES, "code")


class NodesError(Exception):
    """Nodes that cannot be reached: another allocation may have better ones."""


def check_nodes(nodes: Sequence[str], tasks_per_node: int, folder: Path, steps: Steps) -> None:
    """Look at all nodes of this allocation.

    Args:
        folder: that every node has to share.

    Raises:
        UserError: naming the node and what is wrong with it.
        NodesError: a node cannot be reached.
    """
    may_share = asked_backend(os.environ) == GLOO
    token = secrets.token_hex(8)
    shared = folder / f".preflight-{token}"
    shared.mkdir(parents=True)
    try:
        (shared / "token").write_text(token, encoding="utf-8")
        reports = _reports(nodes, shared, steps)
        written = {path.name: path.read_text() for path in shared.iterdir()}
        compare(reports, written, nodes, tasks_per_node, may_share)
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def _reports(nodes: Sequence[str], shared: Path, steps: Steps) -> list[dict[str, Any]]:
    size = str(len(nodes))
    options = [
        f"--nodes={size}",
        f"--ntasks={size}",
        "--ntasks-per-node=1",
        "--overlap",
        "--kill-on-bad-exit=1",
        "--input=none",
    ]
    command = steps.command(options, "mome_dist.launchers.slurm.preflight", str(shared.absolute()))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise NodesError(f"not all of {' '.join(nodes)} answered within {_TIMEOUT_SECONDS} s") from error
    if done.returncode:
        raise NodesError(f"not all of {' '.join(nodes)} could be started on:\n{done.stderr.strip()}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def compare(
    reports: Sequence[Mapping[str, Any]],
    written: Mapping[str, str],
    nodes: Sequence[str],
    tasks_per_node: int,
    may_share: bool = False,
) -> None:
    """Judge what the nodes reported.

    Args:
        reports: `describe_node` of each.
        written: files in the shared folder as the first node sees them, by name.
        may_share: whether the ranks of a node may use one GPU together.

    Raises:
        UserError: naming the first node that is wrong, and the fix.
    """
    if len(reports) != len(nodes):
        raise NodesError(f"{len(reports)} of {len(nodes)} nodes answered: {', '.join(r['node'] for r in reports)}")
    for key in _SAME_EVERYWHERE:
        usual = Counter(report[key] for report in reports).most_common(1)[0][0]
        for report in reports:
            if report[key] != usual:
                raise UserError(
                    f"node {report['node']} has {key} {report[key]}, the others have {usual}: use one environment on a "
                    f"shared file system (node {report['node']} runs {report['executable']})."
                )
    most_gpus = max(report["gpus"] for report in reports)  # without any, training uses the CPUs
    for report in reports:
        if report["error"] or report["token"] != written.get("token") or report["node"] not in written:
            reason = report["error"] or "it sees another directory there"
            raise UserError(
                f"node {report['node']} cannot share the output directory {report['folder']}: {reason}. Give an "
                "output_dir on a file system that all nodes mount, and that this user may write to."
            )
        if most_gpus and report["gpus"] < (1 if may_share else tasks_per_node):
            raise UserError(
                f"node {report['node']} has {report['gpus']} visible GPUs for {tasks_per_node} ranks: ask for "
                f"--gpus-per-node={tasks_per_node}, or for fewer --ntasks-per-node; {SHARING_ADVICE}."
            )


def describe_node(shared: Path) -> dict[str, Any]:
    """What this node has, and whether it can read and write in ``shared``. Imports nothing heavy."""
    name, token, error = os.environ.get("SLURMD_NODENAME", socket.gethostname()), None, None
    try:
        token = (shared / "token").read_text(encoding="utf-8")
        (shared / name).write_text(name, encoding="utf-8")
    except OSError as problem:
        error = f"{problem.strerror} ({problem.filename})"
    return {
        "node": name,
        "folder": str(shared.parent),
        "executable": sys.executable,
        "python": platform.python_version(),
        **{package: version_of(package) for package in _PACKAGES},
        "code": str(Path(mome_dist.__file__).parent),
        "gpus": len(visible_gpus(os.environ)),
        "token": token,
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(describe_node(Path(sys.argv[1]))))
