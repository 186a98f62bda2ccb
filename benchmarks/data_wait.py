"""How long a training step waits for its data: features from the cache, or clips that are decoded and encoded in it.

    python -m benchmarks.data_wait         with experiment=quickstart, two processes

Trainings of a few steps take turns. It needs what the experiment needs: corpus, LLM and encoders
(docs/tutorials/first-run.md). The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.measuring import machine
from benchmarks.results import RESULTS, table, write_results
from mome_dist.cli import main_guard
from mome_dist.launchers.local import launch
from mome_dist.training_log import TrainingLog

FIRST_STEPS = 4  # that do not count: files are not in memory yet, and dispatches are tried
CASES = {
    "features from the cache": ["data.features=cached"],
    "encoded in the step": ["data.features=online"],
    "augmented and encoded in the step": ["data.features=online", "augmentation=paper"],
    "the same, two threads that decode": ["data.features=online", "augmentation=paper", "data.decode_threads=2"],
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line; what is no option is an override of every training."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_wait", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--experiment", default="quickstart", help="of configs/experiment (default: quickstart)")
    parser.add_argument("--nproc", type=int, default=2, help="processes of each training (default: 2)")
    parser.add_argument("--steps", type=int, default=8, help="of each training that count (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each kind (default: 3)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of every training")
    return parser.parse_intermixed_args(arguments)


def training_arguments(options: argparse.Namespace, case: str, directory: Path) -> list[str]:
    """Overrides of one training, which neither saves before its end nor validates."""
    return [
        f"experiment={options.experiment}",
        *options.overrides,
        *CASES[case],
        f"training.steps={FIRST_STEPS + options.steps}",
        "training.save_every=0",
        "training.validate_every=0",
        f"output_dir={directory}",
    ]


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step that counts, and those that its slowest rank waited for data, by case.

    Raises:
        SystemExit: with the exit code of a training that failed.
    """
    found: dict[str, dict[str, list[float]]] = {case: {"seconds": [], "data_wait_seconds": []} for case in CASES}
    for number in range(options.rounds):
        for case, figures in found.items():
            with tempfile.TemporaryDirectory() as folder:
                directory = Path(folder) / f"run{number}"
                code = launch("mome_dist.train", options.nproc, training_arguments(options, case, directory))
                if code:
                    raise SystemExit(code)
                log = TrainingLog.read(directory / "metrics.jsonl")
            for key, values in figures.items():
                values += [float(record[key]) for record in log.steps[FIRST_STEPS:]]
    return found


def render(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Sections of the result file."""
    rows = []
    for case, found in figures.items():
        step, waits = statistics.median(found["seconds"]), found["data_wait_seconds"]
        wait = statistics.median(waits)
        rows.append([case, f"{step:.2f}", f"{wait * 1e3:.0f}", f"{wait / step:.1%}", f"{max(waits) * 1e3:.0f}"])
    steps = len(next(iter(figures.values()))["seconds"])
    return [
        f"Medians of {steps} steps. Waiting is for files, decoding, augmentation and the building of the batch, on the "
        "slowest rank; encoding is work of the step.",
        table(["features", "seconds a step", "waits ms", "of the step", "longest wait ms"], rows),
    ]


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(given)
    facts = machine()
    figures = measure(options)
    path = write_results(
        name="data_wait",
        title="How long a step waits for data",
        command=" ".join(["python -m benchmarks.data_wait", *given]),
        machine={**facts, "processes": options.nproc},
        sections=[f"`experiment={options.experiment}`, one thread a process.", *render(figures)],
        figures=figures,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
