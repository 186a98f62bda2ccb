"""What `audio_encoder.padding=clip` costs in words: the same training with either padding, evaluated alike.

    python -m benchmarks.padding_wer       with experiment=tiny; encoding with `30s` takes most of its half hour

Views without sound are left out: padding is the audio encoder's. Runs continue where they were stopped, and what is
finished is not done again. It needs what the experiment needs: corpus, LLM and encoders (docs/tutorials/first-run.md).

The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.encoder_padding import PADDINGS
from benchmarks.learning import Model, parser_of_trainings, plan, run_all
from benchmarks.methods import VIEWS, wer_cell
from benchmarks.results import table, write_results
from mome_dist.cli import main_guard

HEARD = tuple(view for view in VIEWS if not view.startswith("vsr"))
CONDITIONS = ("noise=[clean,babble]", "snr=[0]")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line; what is no option is an override of every training."""
    parser = parser_of_trainings("padding_wer", __doc__)
    parser.add_argument("--experiment", default="tiny", help="of configs/experiment (default: tiny)")
    return parser.parse_intermixed_args(arguments)


def models_of(options: argparse.Namespace) -> list[Model]:
    """One run for each padding."""
    return [
        Model(
            way,
            options.runs / way,
            [f"experiment={options.experiment}", f"audio_encoder.padding={way}", *options.overrides],
            CONDITIONS,
        )
        for way in PADDINGS
    ]


def render(figures: Mapping[str, Any]) -> list[str]:
    """Sections of the result file."""
    rows = []
    for way, results in figures.items():
        for condition in dict.fromkeys(view["condition"] for view in results["views"]):
            found = {view["view"]: view for view in results["views"] if view["condition"] == condition}
            rows.append([f"`{way}`", condition, *(wer_cell(found.get(view)) for view in HEARD)])
    first = next(iter(figures.values()))
    return [
        f"WER % of {first['utterances']} sentences by unseen speakers after {first['step']} steps, with 95 % bootstrap "
        "intervals; one seed. Each row was trained and evaluated with its own padding; all else is the same.",
        table(["padding", "condition", *(view.upper() for view in HEARD)], rows),
    ]


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
    from mome_dist.evaluation.results import RESULTS as EVALUATION
    from mome_dist.evaluation.results import read_results

    figures = {model.name: read_results(model.directory / "evaluation" / EVALUATION) for model in models}
    path = write_results(
        name="padding_wer",
        title="Padding of Whisper's clips, in words",
        command=" ".join(["python -m benchmarks.padding_wer", *given]),
        machine=machine(),
        sections=render(figures),
        figures=figures,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
