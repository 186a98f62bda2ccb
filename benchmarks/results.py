"""Running worlds and writing result tables: Markdown for people, JSON with all figures."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mome_dist.files import write_json, write_text
from mome_dist.launchers.local import launch
from mome_dist.versions import commit_here

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def measure_worlds(
    module: str, options: argparse.Namespace, keys: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a module on worlds of ``options.processes`` processes, one after the other.

    Args:
        module: takes ``--figures FILE``, where its rank 0 writes ``{"machine": ..., "cases": [...]}``.
        keys: options that are passed on to it.

    Returns:
        The machine as the first world saw it, and the cases of all worlds.
    """
    arguments = []
    for key in keys:
        value = getattr(options, key)
        arguments += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    machine: dict[str, Any] = {}
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        for processes in options.processes:
            code = launch(module, processes, [*arguments, "--figures", str(figures)])
            if code:
                raise SystemExit(code)
            measured = json.loads(figures.read_text())
            machine = machine or measured["machine"]
            cases += measured["cases"]
    return machine, cases


def rank_arguments(
    what: str | None, add_options: Callable[[argparse.ArgumentParser], None], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """The command line of a module that `measure_worlds` runs: its options, and ``figures``, where they go."""
    parser = argparse.ArgumentParser(description=(what or "").strip())
    add_options(parser)
    parser.add_argument("--figures", type=Path, required=True, help="JSON file that rank 0 writes")
    return parser.parse_args(arguments)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_results(
    name: str, title: str, command: str, machine: Mapping[str, Any], sections: Sequence[str], figures: Any, folder: Path
) -> Path:
    """Write ``name.md`` and ``name.json``; return the path of the former.

    Args:
        command: what was run, for who wants to run it again.
        machine: from `benchmarks.measuring.machine`.
        sections: Markdown, put together with blank lines.
        figures: everything measured, JSON-serialisable.
    """
    words = ", ".join(f"{key} {value}" for key, value in machine.items())
    commit = commit_here(str(RESULTS.relative_to(ROOT)))  # tables are no change: they are written one after the other
    about = f"`{command}` at {commit}"
    text = "\n\n".join([f"# {title}", about, f"Machine: {words}.", *sections]) + "\n"
    path = folder / f"{name}.md"
    record = {"command": command, "commit": commit, "machine": dict(machine), "figures": figures}
    write_json(folder / f"{name}.json", record)
    write_text(path, text)
    return path
