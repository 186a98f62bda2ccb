"""What is learned from the synthetic corpus: held-out speakers in babble, and one Matryoshka model against fixed rates.

    python -m benchmarks.learning                                        experiment=tiny
    python -m benchmarks.learning --experiments tiny tiny_noise          the same with noise in training beside it
    python -m benchmarks.learning --plan                                 only say what is left to do

Each experiment is trained and evaluated in all its views, clean and in babble. Beside the first one, models are trained
that see one view only, the coarsest of each task, for as many steps. Runs continue where they were stopped, and what is
finished is not done again. It needs what the experiments need: corpus, LLM and encoders (docs/tutorials/first-run.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, table, write_results
from mome_dist.cli import main_guard
from mome_dist.errors import UserError
from mome_dist.files import write_json
from mome_dist.launchers.local import launch

RATIOS = (-5, 0, 5, 10)
BABBLE = ("noise=[clean,babble]", f"snr=[{','.join(map(str, RATIOS))}]")
# The coarsest view of each task, alone: its rates, and one view a step, for there is no other.
FIXED = {
    "asr(16)": ["task.tasks=[asr]", "task.asr_audio_rates=[16]", "task.views_per_step=1"],
    "vsr(5)": ["task.tasks=[vsr]", "task.vsr_video_rates=[5]", "task.views_per_step=1"],
    "avsr(16,5)": [
        "task.tasks=[avsr]",
        "task.avsr_audio_rates=[16]",
        "task.avsr_video_rates=[5]",
        "task.views_per_step=1",
    ],
}
DONE = "arguments.json"  # of an evaluation that is finished: what it was asked


@dataclass(frozen=True)
class Model:
    """One training run with its evaluation.

    Attributes:
        name: in tables and as a directory.
        directory: of the run.
        overrides: of the training, without those that all runs share.
        conditions: arguments of the evaluation; by default clean, and in babble.
    """

    name: str
    directory: Path
    overrides: list[str] = field(default_factory=list)
    conditions: tuple[str, ...] = BABBLE


def parser_of_trainings(name: str, description: str | None) -> argparse.ArgumentParser:
    """What every benchmark takes that trains and evaluates: give it options of its own, and `parse_intermixed_args`.

    Args:
        name: of the benchmark; its runs are in ``runs/NAME``.
        description: whose first line says what it does.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(description or "").partition("\n")[0]
    )
    parser.add_argument("--nproc", type=int, default=2, help="processes of each training and evaluation (default: 2)")
    parser.add_argument("--limit", type=int, help="test utterances (default: all)")
    parser.add_argument("--plan", action="store_true", help="say what is left to do, and do nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs") / name, help="directory of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of every training")
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line; what is no option is an override of every training."""
    parser = parser_of_trainings("learning", __doc__)
    parser.add_argument("--experiments", nargs="+", default=["tiny"], metavar="NAME", help="of configs/experiment")
    parser.add_argument("--no-fixed", action="store_true", help="no models of one view")
    return parser.parse_intermixed_args(arguments)


def models_of(options: argparse.Namespace) -> list[Model]:
    """Every run: the experiments, then the fixed-rate models of the first one."""
    found = [
        Model(name, options.runs / name, [f"experiment={name}", *options.overrides]) for name in options.experiments
    ]
    if not options.no_fixed:
        first = options.experiments[0]
        found += [
            Model(
                f"{first}, {view} alone",
                options.runs / f"{first}-{view.translate(str.maketrans('(,', '__', ')'))}",
                [f"experiment={first}", *options.overrides, *more],
            )
            for view, more in FIXED.items()
        ]
    return found


def training_arguments(model: Model) -> list[str]:
    """Overrides of a model's training."""
    return [*model.overrides, f"output_dir={model.directory}", f"name={model.directory.name}"]


def evaluation_arguments(model: Model, options: argparse.Namespace) -> list[str]:
    """Arguments of a model's evaluation."""
    limit = [] if options.limit is None else [f"limit={options.limit}"]
    return [f"checkpoint={model.directory}", *model.conditions, *limit]


def steps_of(model: Model) -> tuple[int, int]:
    """Steps done and to do in all."""
    from mome_dist.checkpoint.format import CheckpointReader, newest_checkpoint
    from mome_dist.config import load_config

    wanted = load_config(training_arguments(model)).training.steps
    newest = newest_checkpoint(model.directory)
    if newest is None:
        return 0, wanted
    with CheckpointReader(newest) as reader:
        return reader.step, wanted


def evaluated(model: Model, options: argparse.Namespace, steps: int) -> bool:
    """Whether the evaluation of these weights was done with these arguments."""
    path = model.directory / "evaluation" / DONE
    if not path.is_file():
        return False
    asked: dict[str, Any] = json.loads(path.read_text())
    return asked == {"arguments": evaluation_arguments(model, options), "step": steps}


def run_all(models: Sequence[Model], options: argparse.Namespace) -> None:
    """Train and evaluate what is not done yet.

    Raises:
        SystemExit: with the exit code of a training or evaluation that failed.
    """
    for model in models:
        done, wanted = steps_of(model)
        if done < wanted:
            _launch("mome_dist.train", options.nproc, training_arguments(model))
        if not evaluated(model, options, wanted):
            arguments = evaluation_arguments(model, options)
            _launch("mome_dist.evaluate", options.nproc, arguments)
            write_json(model.directory / "evaluation" / DONE, {"arguments": arguments, "step": wanted})


def _launch(module: str, processes: int, arguments: list[str]) -> None:
    code = launch(module, processes, arguments)
    if code:
        raise SystemExit(code)


def plan(models: Sequence[Model], options: argparse.Namespace) -> str:
    """What is left to do, as a table."""
    rows, left = [], 0
    for model in models:
        done, wanted = steps_of(model)
        left += max(0, wanted - done)
        rows.append([model.name, str(wanted), str(done), "yes" if evaluated(model, options, wanted) else "no"])
    return table(["run", "steps", "done", "evaluated"], rows) + f"\n\n{left} training steps are left."


def figures_of(models: Sequence[Model], experiments: int) -> dict[str, Any]:
    """Everything that was found.

    Args:
        models: experiments first.
        experiments: how many of them are.

    Returns:
        ``evaluations`` by the name of a run (``results.json``), and ``comparisons`` of the first run with each
        fixed-rate model on the same utterances.
    """
    from mome_dist.evaluation.comparison import compare, read_texts
    from mome_dist.evaluation.results import RESULTS as EVALUATION
    from mome_dist.evaluation.results import read_results

    first = read_texts(models[0].directory)
    comparisons = [row for model in models[experiments:] for row in compare(read_texts(model.directory), first)]
    evaluations = {model.name: read_results(model.directory / "evaluation" / EVALUATION) for model in models}
    for results in evaluations.values():
        results.pop("checkpoint")
    return {"evaluations": evaluations, "comparisons": comparisons}


def render(figures: Mapping[str, Any], experiments: Sequence[str]) -> list[str]:
    """Sections of the result file."""
    from mome_dist.evaluation.tables import grid_columns, markdown

    sections = []
    for name in experiments:
        results = figures["evaluations"][name]
        grid = markdown(grid_columns(results["views"], intervals=True))
        sections += [
            f"## {name}: WER % of {results['utterances']} sentences by unseen speakers",
            f"Step {results['step']}. In round brackets 95 % bootstrap intervals; in square ones the number without "
            "the condition, where a view cannot notice it.",
            grid,
            f"![{name} in babble]({_noise_figure(name)})",
        ]
    rows = [
        [
            row["view"],
            row["condition"],
            f"{row['other_wer']:.1f}",
            f"{row['wer']:.1f}",
            f"{row['difference']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})",
            verdict(row),
        ]
        for row in figures["comparisons"]
    ]
    if rows:
        columns = ["view", "condition", "alone %", "one model for all %", "difference (95 %)", "which is better"]
        sections += [
            f"## One model for all rates against one model a rate ({experiments[0]})",
            "As many steps each. A model of one view sees it in every step; the one model for all draws its views in "
            "turn, so it has seen each of them less often. Differences are of the same utterances, resampled in pairs.",
            table(columns, rows),
            "![Differences](learning.png)",
        ]
    return sections


def verdict(row: Mapping[str, Any]) -> str:
    """Which system is better, if the interval of the difference says so."""
    if row["low"] <= 0 <= row["high"]:
        return "not told apart"
    return "one for all" if row["high"] < 0 else "alone"


def _noise_figure(experiment: str) -> str:
    return f"learning_{experiment}.png"


def draw(figures: Mapping[str, Any], experiments: Sequence[str], folder: Path) -> None:
    """Write the plots beside the table."""
    from matplotlib.figure import Figure

    from mome_dist.evaluation.condition_plots import noise_figure
    from mome_dist.evaluation.style import INK, MUTED, TASK_COLORS, grid, save_figure, styled

    for name in experiments:
        save_figure(noise_figure(figures["evaluations"][name]["views"]), folder / _noise_figure(name))
    rows = figures["comparisons"][::-1]
    if not rows:
        return
    with styled():
        figure = Figure(figsize=(7, 1.2 + 0.26 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            color = TASK_COLORS[row["task"]]
            axes.hlines(place, row["low"], row["high"], colors=color, linewidth=2)
            axes.plot(row["difference"], place, "o", color=color, markersize=4)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [f"{row['view']}, {row['condition']}" for row in rows], color=INK)
        axes.set(
            title="One model for all rates minus one model a rate",
            xlabel="difference in WER [%], 95 % interval; left of zero the one model is better",
        )
        grid(axes, "x")
    save_figure(figure, folder / "learning.png")


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(arguments)
    if len(set(options.experiments)) < len(options.experiments):
        raise UserError("--experiments names one twice.")
    models = models_of(options)
    print(plan(models, options), flush=True)
    if options.plan:
        return
    run_all(models, options)
    from benchmarks.measuring import machine

    figures = figures_of(models, len(options.experiments))
    draw(figures, options.experiments, options.results)
    path = write_results(
        name="learning",
        title="What is learned on the synthetic corpus",
        command=" ".join(["python -m benchmarks.learning", *given]),
        machine=machine(),
        sections=render(figures, options.experiments),
        figures=figures,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
