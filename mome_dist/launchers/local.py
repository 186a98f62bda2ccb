"""Run a module on N processes of this machine: what ``mome-dist launch`` does, with ``--module`` for the command.

    python -m launchers.local --nproc 2 experiment=quickstart
    python -m launchers.local --nproc 2 --restarts 3 experiment=quickstart
    python -m launchers.local --nproc 2 --module mome_dist.evaluate runs/quickstart
    python -m launchers.local --nproc 4 --timeout 600 --module my.module -- --timeout 3

Options of the launcher come first, or as ``launcher.*`` keys (``configs/launcher/local.yaml``); everything that it does
not know goes to the module, and so does all that follows ``--``. Rank 0 writes to the terminal, the others to
``rank-N.log``. When a rank fails, the others are ended and the exit code is that of the first to fail (124 when
``--timeout`` ran out, 128 + N when a rank died of signal N; `mome_dist.exit_codes` has the others). With
``--restarts N`` a run that was preempted, crashed or lost a rank starts again, up to N times, and continues from its
newest checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mome_dist.cli import Parser, main_guard
from mome_dist.config import load_group
from mome_dist.errors import UserError
from mome_dist.exit_codes import RANK_LOST, TIMED_OUT
from mome_dist.launchers.environment import Machine, own_cores, rank_environment
from mome_dist.launchers.gpus import visible_gpus
from mome_dist.launchers.options import DEFAULT_MODULE, PREFIX, LocalOptions, refuse_options, require_module
from mome_dist.launchers.ranks import Outcome, RankGroup
from mome_dist.launchers.restarts import run_with_restarts
from mome_dist.ports import free_port
from mome_dist.preflight import validate_overrides

_TAIL_LINES = 30


def command_line() -> Parser:
    """The launcher's own options."""
    parser = Parser(
        prog="python -m launchers.local",
        description="Run a module on N processes of this machine.",
        usage="%(prog)s [--nproc N] [--module M] [--timeout S] [--restarts N] [--log-dir DIR] [--dry-run] "
        "[launcher.key=value ...] [key=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="number of processes")
    parser.add_argument("--module", default=DEFAULT_MODULE, metavar="M", help=f"what to run ({DEFAULT_MODULE})")
    parser.add_argument("--timeout", type=float, metavar="S", help="end everything after S seconds, with code 124")
    parser.add_argument("--restarts", type=int, metavar="N", help="start again up to N times after a failure")
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="folder of rank-N.log (default: a temporary one)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    return parser


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the launcher's own options, and the arguments for the module."""
    own, after = list(arguments), []
    if "--" in own:
        position = own.index("--")
        own, after = own[:position], own[position + 1 :]
    options, unknown = command_line().parse_known_args(own)
    keys = [word for word in unknown if word.startswith(PREFIX)]
    given = load_group("launcher", "local", keys, LocalOptions)
    if options.nproc is None:
        options.nproc = given.tasks_per_node
    if options.timeout is None:
        options.timeout = given.timeout_seconds
    if options.restarts is None:
        options.restarts = given.restarts
    if options.log_dir is None and given.log_dir is not None:
        options.log_dir = Path(given.log_dir)
    return options, [word for word in unknown if word not in keys] + after


def check_request(module: str, nproc: int, arguments: Sequence[str], restarts: int = 0) -> list[str]:
    """Find mistakes before any process starts; return the arguments for the processes.

    Raises:
        UserError: no such module, a senseless number of processes, or a configuration that the module would refuse.
    """
    if nproc < 1:
        raise UserError(f"--nproc is {nproc}: at least one process is needed")
    if restarts < 0:
        raise UserError(f"--restarts is {restarts}: must be at least 0")
    require_module(module)
    refuse_options(module, arguments, ("--nproc", "--module", "--timeout", "--restarts", "--log-dir", "--dry-run"))
    if module == DEFAULT_MODULE and any(argument.startswith("-") for argument in arguments):
        return list(arguments)  # it has no options but --help
    return validate_overrides(module, list(arguments), world_size=nproc)


def launch(
    module: str,
    nproc: int,
    arguments: Sequence[str],
    timeout: float | None = None,
    restarts: int = 0,
    log_dir: Path | None = None,
) -> int:
    """Run ``python -m module arguments...`` on `nproc` local ranks and return the exit code (see the module's text).

    ``timeout`` is in seconds, over all starts together.
    """
    logs_root = log_dir or Path(tempfile.mkdtemp(prefix="mome_dist-ranks-"))
    logs_root.mkdir(parents=True, exist_ok=True)
    logs = [logs_root / f"rank-{rank}.log" for rank in range(1, nproc)]
    deadline = None if timeout is None else time.monotonic() + timeout
    cores = own_cores()
    machine = Machine(nproc, cores, len(cores), visible_gpus(os.environ))
    bound = [machine.cores_of(rank) for rank in range(nproc)] if machine.gpus else None
    named = False  # whether the user was told to look there

    def start(environment: Mapping[str, str]) -> Outcome:
        port = free_port()  # a new one each time: the old one may still be in use for a while
        environments = [rank_environment(rank, machine, port, environment) for rank in range(nproc)]
        with RankGroup() as group:
            group.start([sys.executable, "-m", module, *arguments], environments, logs, bound)
            outcome = group.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        nonlocal named
        named = outcome.code != 0 and _explain(outcome, timeout, logs_root)
        return outcome

    try:
        return run_with_restarts(start, restarts, os.environ).code
    finally:
        if log_dir is None and not named:
            shutil.rmtree(logs_root, ignore_errors=True)


def _explain(outcome: Outcome, timeout: float | None, logs_root: Path) -> bool:
    """Print on stderr which rank failed, the end of its log, and where the logs are; return whether it named these."""
    if outcome.told and outcome.code != RANK_LOST:  # there the log of the lost rank says why
        return False
    lines = []
    if outcome.failed_rank is None:
        assert outcome.code == TIMED_OUT
        lines.append(f"launcher: no end after {timeout:g} s, all ranks were stopped")
    else:
        lines.append(f"launcher: rank {outcome.failed_rank} failed first, with exit code {outcome.code}")
        log = logs_root / f"rank-{outcome.failed_rank}.log"
        if log.exists():
            lines += log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    logged = not outcome.asked_to_stop and any(log.stat().st_size for log in logs_root.iterdir())
    if logged:
        lines.append(f"launcher: the logs of the other ranks are in {logs_root}")
    print("\n".join(lines), file=sys.stderr, flush=True)
    return logged


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options, rest = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    rest = check_request(options.module, options.nproc, rest, options.restarts)
    if options.dry_run:
        print(shlex.join([sys.executable, "-m", options.module, *rest]))
        return 0
    return launch(options.module, options.nproc, rest, options.timeout, options.restarts, options.log_dir)


if __name__ == "__main__":
    sys.exit(main())
