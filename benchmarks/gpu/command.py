"""What the benchmarks of a GPU share: their options, the device, and the files that they write.

No torch at the top: what is to be measured on the CPU of a machine with a GPU must say so before torch looks for one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import RESULTS, write_results
from mome_dist.errors import UserError
from mome_dist.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch


def parser_of(name: str, doc: str | None, rounds: int = 9, warm_up: int = 2) -> argparse.ArgumentParser:
    """The options that every benchmark of a GPU takes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.gpu.{name}",
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where; a GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="sizes of a rehearsal on a CPU, one turn")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of every candidate, whose median counts")
    parser.add_argument("--warm-up", type=int, default=warm_up, help="turns before them that do not count")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser


def run(
    name: str,
    title: str,
    options: argparse.Namespace,
    arguments: Sequence[str] | None,
    summary: Callable[[Any], list[str]],
    render: Callable[[Any], list[str]],
) -> None:
    """Measure, write ``gpu_NAME.md`` and ``gpu_NAME.json``, and print the table.

    What measures is ``measure(options, device)`` of ``benchmarks.gpu.NAME_work``, which returns JSON values; it is
    imported when the device is settled.

    Args:
        arguments: as given, for who wants to run it again.
        summary: makes lines of the figures, aims that are judged first.
        render: makes the other sections.

    Raises:
        UserError: if there is no GPU for it, or a rehearsal has nowhere to go.
    """
    device = open_device(options)
    from benchmarks.measuring import machine

    described = machine(device)
    figures = importlib.import_module(f"benchmarks.gpu.{name}_work").measure(options, device)
    command = " ".join([f"python -m benchmarks.gpu.{name}", *(sys.argv[1:] if arguments is None else arguments)])
    publish(name, title, command, described, figures, summary, render, options)


def publish(
    name: str,
    title: str,
    command: str,
    machine: Mapping[str, Any],
    figures: Any,
    summary: Callable[[Any], list[str]],
    render: Callable[[Any], list[str]],
    options: argparse.Namespace,
) -> None:
    """Write the two files of a benchmark, and print the one for people."""
    rehearsal = ["**A rehearsal at tiny sizes: these figures mean nothing.**"] if "--tiny" in command.split() else []
    sections = [*rehearsal, "\n".join(summary(figures)), *render(figures)]
    print(write_results(f"gpu_{name}", title, command, machine, sections, figures, options.results).read_text())


def open_device(options: argparse.Namespace) -> torch.device:
    """The device that the options ask for, ready to use; a rehearsal has one round.

    Raises:
        UserError: if there is no GPU for it, or a rehearsal has nowhere to go.
    """
    if options.tiny and options.results.resolve() == RESULTS:
        raise UserError(
            "--tiny: its figures mean nothing and do not belong beside measured ones: set --results FOLDER."
        )
    quiet_libraries()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces every start
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    available = torch.cuda.is_available()
    if not available and (options.device == "cuda" or not options.tiny):
        raise UserError(
            f"torch {torch.__version__} sees no GPU (--device {options.device or 'cuda'}): --tiny --device cpu is the "
            "rehearsal."
        )
    if not available:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(1)
    if options.tiny:
        options.rounds, options.warm_up = 1, 0
    torch.manual_seed(0)
    device = torch.device("cuda:0" if available else "cpu")
    if available:
        torch.cuda.set_device(device)
    return device


def target(met: bool | None, what: str, found: str) -> str:
    """A line that judges an aim; None says that nothing can be said, as on a CPU."""
    verdict = {True: "met", False: "MISSED", None: "not judged"}[met]
    return f"- {verdict}: {what}; found: {found}"
