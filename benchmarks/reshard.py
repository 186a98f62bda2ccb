"""Resharding a checkpoint against copying it: the same bytes read, written and flushed to disk.

    python -m benchmarks.reshard

The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import machine
from benchmarks.results import RESULTS, table, write_results
from mome_dist.checkpoint.format import CONFIG, complete, file_facts, index_of, merge_parts
from mome_dist.checkpoint.parts import parts_of, write_part
from mome_dist.checkpoint.pieces import Range, TensorFacts
from mome_dist.checkpoint.source import CHUNK, Source
from mome_dist.cli import main_guard
from mome_dist.config import load_config, save_config
from mome_dist.parallel.layout import Layout
from mome_dist.sharing import of_format_2

LAYERS, EXPERTS, HIDDEN = 16, 32, 2048
WORK = ("copy", "canonical", "deepspeed")
MOMENTS = ("exp_avg", "exp_avg_sq")


class _Random(Source):
    """Tensors of random numbers: the same few megabytes again and again."""

    def __init__(self, facts: dict[str, TensorFacts]) -> None:
        super().__init__(facts, {}, {}, None, None)
        self._block = np.random.default_rng(0).normal(size=CHUNK // 4).astype(np.float32).tobytes()

    def chunks(self, piece: Range) -> Iterator[memoryview]:
        left = piece.count * 4
        while left:
            yield memoryview(self._block)[: min(left, CHUNK)]
            left -= min(left, CHUNK)


def make_checkpoint(folder: Path, gigabytes: float, layout: Layout) -> None:
    """Write a layout-free checkpoint of about this size, as AdamW's: weights and two moments."""
    units = max(1, round(gigabytes * 1e9 / (4 * 3 * LAYERS * EXPERTS) / (2 * HIDDEN)))
    shapes: dict[str, tuple[int, ...]] = {"projectors.streams.audio.all.0.weight": (HIDDEN, 384)}
    for number in range(LAYERS):
        shapes[f"mome.{number}.router_weight"] = (EXPERTS, HIDDEN)
        for kind, count in (("routed", EXPERTS), ("shared", 1)):
            prefix = f"mome.{number}.{kind}"
            shapes |= {f"{prefix}.down_weight": (count, units, HIDDEN), f"{prefix}.down_bias": (count, units)}
            shapes |= {f"{prefix}.up_weight": (count, HIDDEN, units), f"{prefix}.up_bias": (count, HIDDEN)}
    prefixes = ("model", *(f"optimizer/{moment}" for moment in MOMENTS))
    facts = {
        f"{prefix}/{name}": TensorFacts(shape, "float32", of_format_2(name, shape))
        for prefix in prefixes
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    files, described, source = {}, [], _Random(facts)
    for rank, rows in parts_of(facts, layout, LAYERS):
        path = folder / f"part-{rank:05d}.safetensors"
        files[path.name], tensors = write_part(path, rows, source, lambda written: None)
        described.append(tensors)
    save_config(load_config(["experiment=tiny", "llm.path=none"]), folder / CONFIG)
    files[CONFIG] = file_facts(folder / CONFIG)
    record = {"step": 100, "optimizer": "adamw", "optimizer_steps": 100, "data": {"order": {}, "utterances_seen": 0}}
    record |= {"written_by": {"layout": asdict(layout), "zero": 1}, "versions": {}, "frozen": {}}
    complete(folder, index_of(record, files, merge_parts(described)))


def measure(source: Path, scratch: Path, rounds: int, warm_up: int) -> dict[str, list[dict[str, float]]]:
    """Figures of each work in each round (A B C, A B C, ...); first ones do not count."""
    figures: dict[str, list[dict[str, float]]] = {work: [] for work in WORK}
    for turn in range(warm_up + rounds):
        for work in WORK:
            command = [sys.executable, "-m", "benchmarks.reshard_process", work, str(source), str(scratch / "target")]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            if turn >= warm_up:
                figures[work].append(json.loads(done.stdout.splitlines()[-1]))
    return figures


def render(figures: dict[str, list[dict[str, float]]]) -> tuple[list[str], dict[str, Any]]:
    """The sections of the result file, and medians."""
    names = {"copy": "copy", "canonical": "layout-free, other ranks", "deepspeed": "DeepSpeed's native layout"}
    medians = {
        work: {key: statistics.median(each[key] for each in rounds) for key in ("seconds", "bytes", "peak")}
        for work, rounds in figures.items()
    }
    for each in medians.values():
        each["speed"] = each["bytes"] / each["seconds"]
        each["of_copy"] = each["speed"] / (medians["copy"]["bytes"] / medians["copy"]["seconds"])
    rows = [
        [
            names[work],
            f"{each['bytes'] / 1e9:.2f}",
            f"{each['seconds']:.1f}",
            f"{each['speed'] / 1e9:.2f}",
            f"{each['of_copy']:.0%}",
            f"{each['peak'] / 1e6:.0f}",
        ]
        for work, each in medians.items()
    ]
    columns = ["to", "GB written", "s", "GB/s", "of the copy's speed", "peak memory, MB"]
    text = (
        f"From 8 ranks (tp 2 x pp 1 x dp 4, ep 4) to 8 ranks (tp 1 x pp 2 x dp 4, ep 2), ZeRO 1; {LAYERS} layers, "
        f"{EXPERTS} experts, hidden size {HIDDEN}, weights and AdamW's moments. Medians of {len(figures['copy'])} "
        "round(s)."
    )
    return [text, table(columns, rows)], medians


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reshard",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="whose medians count")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before them that do not count")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    described = machine()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_checkpoint(scratch / "source", options.gigabytes, Layout(tp=2, pp=1, ep=4, dp=4))
        figures = measure(scratch / "source", scratch, options.rounds, options.warm_up)
    sections, medians = render(figures)
    path = write_results(
        name="reshard",
        title="Resharding a checkpoint",
        command=" ".join(["python -m benchmarks.reshard", *given]),
        machine=described,
        sections=sections,
        figures={"medians": medians, "rounds": figures},
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
