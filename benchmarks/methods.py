"""Every method of the family on the synthetic corpus: the same encoders, LLM, clips and steps, one table.

    python -m benchmarks.methods                  all of them with experiment=tiny, some minutes each
    python -m benchmarks.methods --methods mome lora llama_mtsk/mss

A method sees its own views: what it was not trained on stays empty. The encoders stay frozen, also where a method would
train one. Runs continue where they were stopped, and what is finished is not done again. It needs what the experiment
needs: corpus, LLM and encoders (docs/tutorials/first-run.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.learning import Model, parser_of_trainings, plan, run_all
from benchmarks.results import table, write_results
from mome_dist.cli import main_guard

# Those whose encoders may differ in width.
METHODS = (
    "mome",
    "lora",
    "llama_avsr",
    "llama_mtsk/ms",
    "llama_mtsk/ss",
    "llama_mtsk/mss",
    "llama_smop/dedr",
    "omni_avsr/s",
    "omni_avsr/t",
    "omni_avsr/st",
)
VIEWS = ("asr(4)", "asr(16)", "vsr(2)", "vsr(5)", "avsr(4,2)", "avsr(4,5)", "avsr(16,2)", "avsr(16,5)")
FROZEN = ("video_encoder.lora=null", "data.features=cached")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line; what is no option is an override of every training."""
    parser = parser_of_trainings("methods", __doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument("--experiment", default="tiny", help="of configs/experiment (default: tiny)")
    return parser.parse_intermixed_args(arguments)


def models_of(options: argparse.Namespace) -> list[Model]:
    """One run for each method."""
    return [
        Model(
            method,
            options.runs / method.replace("/", "_"),
            [f"experiment={options.experiment}", f"method={method}", *FROZEN, *options.overrides],
            ("noise=clean",),
        )
        for method in options.methods
    ]


def figures_of(models: Sequence[Model]) -> dict[str, Any]:
    """``evaluations`` and ``views_per_step``, by method."""
    from mome_dist.config.derived import schedule_of
    from mome_dist.config.load import load_saved_config
    from mome_dist.evaluation.results import RESULTS as EVALUATION
    from mome_dist.evaluation.results import read_results

    evaluations, views = {}, {}
    for model in models:
        evaluations[model.name] = read_results(model.directory / "evaluation" / EVALUATION)
        evaluations[model.name].pop("checkpoint")
        schedule = schedule_of(load_saved_config(model.directory / "config.yaml"))
        views[model.name] = len(schedule.of_step(0))
    return {"evaluations": evaluations, "views_per_step": views}


def render(figures: Mapping[str, Any]) -> list[str]:
    """Sections of the result file."""
    rows = []
    for method, results in figures["evaluations"].items():
        found = {view["view"]: view for view in results["views"]}
        trained = sum(results["trainable_parameters"].values())
        rows.append(
            [
                f"`{method}`",
                f"{trained:,}",
                str(figures["views_per_step"][method]),
                *(wer_cell(found.get(view)) for view in VIEWS),
            ]
        )
    first = next(iter(figures["evaluations"].values()))
    return [
        f"WER % of {first['utterances']} sentences by unseen speakers after {first['step']} steps, with 95 % bootstrap "
        "intervals; one seed. Encoders, LLM, clips of a step and number of steps are the same for all; what differs is "
        "what a method trains, on which views and in how many of them a step. It shows that each method learns, and "
        "ranks none: intervals of one seed say nothing of another, and a method of one view sees it in every step.",
        table(["method", "trained parameters", "views a step", *(view.upper() for view in VIEWS)], rows),
    ]


def wer_cell(view: Mapping[str, Any] | None) -> str:
    """WER of an evaluated view with its interval, "-" where it was not trained."""
    if view is None or not view["trained"]:
        return "-"
    return f"{view['wer']:.1f} ({view['wer_low']:.1f}-{view['wer_high']:.1f})"


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(arguments)
    models = models_of(options)
    print(plan(models, options), flush=True)
    if options.plan:
        return
    run_all(models, options)
    from benchmarks.measuring import machine

    figures = figures_of(models)
    path = write_results(
        name="methods",
        title="The methods of the family on the synthetic corpus",
        command=" ".join(["python -m benchmarks.methods", *given]),
        machine=machine(),
        sections=render(figures),
        figures=figures,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
