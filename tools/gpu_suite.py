"""Run what is to be known about a GPU: every check a process with a limit of its own, the most valuable first.

    python -m tools.gpu_suite                            on a machine with a GPU, in less than 9 minutes
    python -m tools.gpu_suite --only dispatch engine     some of them
    python -m tools.gpu_suite --rehearse                 everything at tiny sizes on the CPU

The outcome of a check is in RESULTS/NAME.json as soon as it has ended, and what it printed in RESULTS/NAME.log; the
benchmarks leave their tables there. A check that fails, hangs or crashes does not stop the others. Started again, the
command goes on where it was: what has an outcome is not run again without --again. The exit code is 1 if a check
failed. docs/gpu.md says what the checks are.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mome_dist.cli import Parser, main_guard
from mome_dist.errors import UserError
from mome_dist.files import write_json
from mome_dist.launchers.gpus import visible_gpus
from mome_dist.text_files import read_json, split_lines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("runs/gpu")
DEVICE = "MOME_DIST_TEST_DEVICE"  # of the checks: cuda or cpu
FIGURES = "MOME_DIST_TEST_FIGURES"  # a file for the figures that a check leaves
PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
PATIENCE = 10  # times the limit: of a rehearsal, on a CPU that others may share
LAST_WORDS_SECONDS = 3  # before its limit, a test says where it is
TAIL_LINES = 40
LOG_WIDTH = 120  # columns of the table where there is no terminal to ask


@dataclass(frozen=True)
class Check:
    """One process.

    Attributes:
        name: of the check.
        what: it is, in words.
        seconds: that it may take, start included.
        command: for the interpreter, on a GPU.
        rehearsal: more arguments, on a CPU.
        gpus: that it needs.
    """

    name: str
    what: str
    seconds: float
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] = ()
    gpus: int = 1


@dataclass
class Outcome:
    """What became of a check; see `Check` for what is not said here.

    Attributes:
        verdict: `PASSED`, `FAILED` or `TIMED_OUT`.
        exit_code: minus the number of the signal that killed it.
        seconds: that it took.
        rehearsal: whether it ran on a CPU.
        figures: that it left.
        tail: the last lines that it printed.
    """

    name: str
    what: str
    command: list[str]
    verdict: str
    exit_code: int
    seconds: float
    limit_seconds: float
    rehearsal: bool
    started: str
    figures: dict[str, Any] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)


def _tests(name: str, seconds: float, what: str, gpus: int = 1) -> Check:
    words = f"faulthandler_timeout={seconds - LAST_WORDS_SECONDS:g}"
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", words, f"tests/gpu/test_{name}.py")
    return Check(name, what, seconds, command, ("-o", "faulthandler_timeout=0"), gpus)


def _benchmark(name: str, seconds: float, what: str) -> Check:
    command = ("-m", f"benchmarks.gpu.{name}", "--results", "{results}")
    return Check(name, what, seconds, (*command, "--device", "cuda"), ("--device", "cpu", "--tiny"))


CHECKS = (
    _tests("environment", 30, "device, versions, ceilings of products and copies"),
    _tests("dispatch", 25, "every dispatch of a MoME layer against the CPU in fp32, with gradients"),
    _tests("kernel", 20, "the Triton kernels of a MoME layer against PyTorch's form, with gradients"),
    _tests("synchronisation", 20, "waits of the host in a layer and in a step"),
    _tests("engine", 35, "ZeRO 0, 1 and 2 for five steps against the CPU"),
    _benchmark("step", 75, "a step at the shapes of the paper's job: time, memory, share of the peak"),
    _benchmark("layer", 40, "the layer against DeepSpeed's, Megatron-Core's and two products"),
    _benchmark("profile", 30, "kernels that take most of a step, and idle time"),
    _benchmark("encoders", 25, "encoders in fp32, TF32 and bf16: error and speed"),
    _tests("llm", 25, "Megatron-Core against Hugging Face; the flash kernel by name"),
    _tests("decoding", 25, "greedy and beam search against the CPU, token by token"),
    _benchmark("decode", 20, "speed of decoding"),
    _tests("layouts", 80, "2 and 4 ranks that share the device against one process"),
    _tests("checkpoint", 25, "a checkpoint comes back bit for bit"),
    _tests("precision", 20, "a layer in bf16 against float64"),
    _tests("repeats", 20, "the same bits in 20 repeats"),
    _tests("graphs", 20, "training with its layers in CUDA graphs against one process on the CPU"),
    _tests("nccl", 120, "a GPU for each rank: every exchange over NCCL, layouts", gpus=2),
)


def run_check(check: Check, results: Path, rehearsal: bool) -> Outcome:
    """Run one check in a process group of its own, which is killed at the limit, and write its outcome."""
    log, figures = results / f"{check.name}.log", results / f"{check.name}.figures.json"
    arguments = [word.replace("{results}", str(results)) for word in check.command]
    command = [sys.executable, *arguments, *(check.rehearsal if rehearsal else ())]
    environment = {**os.environ, DEVICE: "cpu" if rehearsal else "cuda", FIGURES: str(figures)}
    if rehearsal:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    limit = check.seconds * (PATIENCE if rehearsal else 1)
    figures.unlink(missing_ok=True)
    started, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    with log.open("wb") as output, _own_group(command, environment, output) as process:
        try:
            code, verdict = process.wait(limit), None
        except subprocess.TimeoutExpired:
            code, verdict = -signal.SIGKILL, TIMED_OUT
    outcome = Outcome(
        name=check.name,
        what=check.what,
        command=["python", *command[1:]],
        verdict=verdict or (FAILED if code else PASSED),
        exit_code=code,
        seconds=round(time.monotonic() - began, 1),
        limit_seconds=limit,
        rehearsal=rehearsal,
        started=started,
        figures=read_json(figures) if figures.exists() else {},
        tail=split_lines(log.read_text(encoding="utf-8", errors="replace"))[-TAIL_LINES:],
    )
    write_json(results / f"{check.name}.json", asdict(outcome))
    figures.unlink(missing_ok=True)
    return outcome


@contextmanager
def _own_group(
    command: Sequence[str], environment: Mapping[str, str], output: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that leads a group; whatever is left of the group at the end is killed."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finished(check: Check, results: Path, rehearsal: bool) -> Outcome | None:
    """The outcome that a check has there already, on a GPU or in a rehearsal; None if it has none."""
    path = results / f"{check.name}.json"
    if not path.exists():
        return None
    found = Outcome(**read_json(path))
    return found if found.rehearsal == rehearsal else None


def chosen_checks(names: Sequence[str], checks: Sequence[Check], gpus: int | None) -> tuple[list[Check], list[Check]]:
    """What is to be run, in order, and what cannot be for want of GPUs.

    Args:
        names: of the checks; empty for all.
        gpus: of this machine; None in a rehearsal, which needs none.

    Raises:
        UserError: for an unknown name, or one that was asked for and needs more GPUs.
    """
    known = {check.name: check for check in checks}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--only {unknown[0]}: no such check; choose from {', '.join(known)}.")
    chosen = [check for check in checks if not names or check.name in names]
    if gpus is None:
        return chosen, []
    if not gpus:
        raise UserError(
            "torch would see no GPU here (python -m mome_dist.launchers.gpus cuda); --rehearse runs on the CPU."
        )
    if names and (large := [check for check in chosen if check.gpus > gpus]):
        raise UserError(f"--only {large[0].name}: needs {large[0].gpus} GPUs, this machine has {gpus}.")
    return [check for check in chosen if check.gpus <= gpus], [check for check in chosen if check.gpus > gpus]


def table_of(outcomes: Sequence[Outcome], earlier: Sequence[str], left_out: Sequence[Check]) -> Table:
    """The outcomes of the checks, also those of an earlier call, and those that need more GPUs."""
    table = Table(title="rehearsal on the CPU" if outcomes and outcomes[0].rehearsal else None)
    for heading in ("check", "verdict", "seconds", "limit", "what"):
        table.add_column(
            heading, no_wrap=heading != "what", justify="right" if heading in ("seconds", "limit") else "left"
        )
    for each in outcomes:
        colour = "green" if each.verdict == PASSED else "red"
        when = " (earlier)" if each.name in earlier else ""
        seconds = f"{each.seconds:.1f}", f"{each.limit_seconds:.0f}"
        table.add_row(each.name, f"[{colour}]{each.verdict}[/]{when}", *seconds, each.what)
    for check in left_out:
        table.add_row(
            check.name, f"[yellow]not run: needs {check.gpus} GPUs[/]", "", f"{check.seconds:.0f}", check.what
        )
    return table


def run_suite(options: argparse.Namespace, checks: Sequence[Check] = CHECKS) -> int:
    """Run the checks that the options ask for; 1 if one failed."""
    gpus = None if options.rehearse else len(visible_gpus(os.environ))
    chosen, left_out = chosen_checks(options.only, checks, gpus)
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    outcomes, earlier, began = [], [], time.monotonic()
    for check in chosen:
        before = None if options.again else finished(check, results, options.rehearse)
        if before is not None:
            outcomes.append(before)
            earlier.append(check.name)
            continue
        console.print(f"{check.name}: {check.what} ...", highlight=False)
        outcomes.append(outcome := run_check(check, results, options.rehearse))
        console.print(f"{check.name}: {outcome.verdict} after {outcome.seconds:.1f} s", highlight=False)
        if outcome.verdict != PASSED:
            console.print(
                "\n".join(f"  {line}" for line in outcome.tail), highlight=False, markup=False, soft_wrap=True
            )
    console.print(table_of(outcomes, earlier, left_out))
    bad = [outcome.name for outcome in outcomes if outcome.verdict != PASSED]
    console.print(
        f"{len(outcomes) - len(bad)} of {len(outcomes)} checks passed; {time.monotonic() - began:.0f} s; {results}",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if bad else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(c.name for c in CHECKS)}")
    parser.add_argument("--rehearse", action="store_true", help="everything at tiny sizes on the CPU")
    parser.add_argument("--again", action="store_true", help="also what has an outcome already")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder of the outcomes (default: {RESULTS})")
    return parser.parse_args(arguments)


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_suite(parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
