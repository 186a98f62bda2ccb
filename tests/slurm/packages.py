"""The Debian packages of the test cluster, installed where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.patience import patience

PACKAGES = (
    *("munge", "slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins"),
    *("slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server-core", "mariadb-client-core"),  # sacct reads a database
    *("iproute2", "shellcheck"),
)
HOW_TO_LEAVE_OUT = """To leave these tests out: make test PYTEST_ARGS='-m "not slurm"'"""
_POLICY = Path("/usr/sbin/policy-rc.d")


def install() -> None:
    """Install what is missing; starts no service.

    Raises:
        RuntimeError: not root, no apt, or apt failed; says what to do.
    """
    if os.geteuid() != 0:
        raise RuntimeError(f"The Slurm tests start a real cluster in namespaces, which needs root. {HOW_TO_LEAVE_OUT}")
    missing = [name for name in PACKAGES if not _is_installed(name)]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise RuntimeError(
            f"The Slurm tests need Debian's packages {', '.join(missing)}, but here is no apt. {HOW_TO_LEAVE_OUT}"
        )
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    with _no_service_starts():
        # A fresh machine has no package lists yet, so a first failure is followed by an update.
        if _apt(command).returncode:
            _apt(["apt-get", "update"])
            done = _apt(command)
            if done.returncode:
                raise RuntimeError(
                    f"apt could not install {', '.join(missing)}:\n{done.stdout[-2000:]}\n{HOW_TO_LEAVE_OUT}"
                )


def _is_installed(name: str) -> bool:
    asked = subprocess.run(["dpkg-query", "-W", "-f=${Status}", name], capture_output=True, text=True, check=False)
    return "ok installed" in asked.stdout


def _apt(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patience(240),
        check=False,
    )


@contextmanager
def _no_service_starts() -> Iterator[None]:
    """Forbid packages to start their services while they are installed, as Debian's policy-rc.d does."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()
