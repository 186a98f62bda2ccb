"""What MoME costs: a training step with it against the same step with projectors only, on the frozen SmolLM2-135M.

In one process also against what plain transformers and PEFT take for the same clips and views.

    python -m benchmarks.train_step                              1 process, and 2 that share the experts
    python -m benchmarks.train_step --shape llama-3.2-3b         two layers of those sizes, with random weights

The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, measure_worlds, table, write_results
from benchmarks.step_ranks import add_step_options
from mome_dist.assets import asset_dir
from mome_dist.cli import main_guard
from mome_dist.llm.shape import LLMShape
from mome_dist.planning.llms import LLMS

WORDS = 1024  # of an LLM of random weights


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="worlds to measure, in turn")
    add_step_options(parser)
    parser.add_argument("--shape", choices=list(LLMS), help="random weights of these sizes instead of --llm")
    parser.add_argument("--layers", type=int, default=2, help="of --shape")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


def times_peft(case: dict[str, Any]) -> float:
    """How many times as fast as transformers with PEFT a step with MoME is."""
    return case["peer"]["milliseconds"] / case["milliseconds"]["mome"]["step"]


def render(cases: Sequence[dict[str, Any]], llm: str, options: argparse.Namespace) -> list[str]:
    """Sections of the result file: the summary and the table."""
    columns = ["processes", "part of a step", "projectors only", "with MoME", "MoME adds", "of the step"]
    rows, summary = [], []
    for case in cases:
        processes = case["processes"]
        plain, mome = case["milliseconds"]["projectors"], case["milliseconds"]["mome"]
        for part in plain:
            added = mome[part] - plain[part]
            times = [f"{plain[part]:.0f}", f"{mome[part]:.0f}", f"{added:+.0f}", f"{added / plain['step']:+.1%}"]
            rows.append([str(processes), part, *times])
        summary.append(f"- {processes} process(es): MoME makes a step {mome['step'] / plain['step'] - 1:.1%} longer")
        if peer := case["peer"]:
            summary.append(
                f"- {processes} process(es): with MoME, a step is {times_peft(case):.2f} times as fast as one of "
                f"transformers with PEFT (LoRA on Q and V, {peer['trained parameters']:,} parameters with its "
                f"projectors), which takes {peer['milliseconds']:.0f} ms"
            )
    parameters = cases[0]["trained parameters"]
    tokens = " and ".join(f"{count} tokens in {view}" for view, count in cases[0]["tokens"].items())
    return [
        f"{llm}, frozen, {options.precision}. MoME beside the feed-forward network of every layer: {options.experts} "
        f"routed experts of {options.bottleneck} units and a shared one, K = 4; `local` in one process, `gather` in "
        f"more. ZeRO 1, AdamW. Each process has one thread and one microbatch a step, of {options.clips} clips: "
        f"{tokens}. One process trains {parameters['projectors']:,} parameters without MoME and "
        f"{parameters['mome']:,} with it.",
        "\n".join(summary),
        "## Milliseconds; forward and backward without MoME are the LLM's and the projectors'",
        table(columns, rows),
    ]


def save_random_llm(shape: LLMShape, folder: Path) -> Path:
    """Write a Llama of a shape with few words and random weights in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        rms_norm_eps=shape.norm_epsilon,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    keys = ("llm", "experts", "bottleneck", "clips", "precision", "rounds", "warm_up")
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            name, title = f"train_step_{options.shape}", f"{options.layers} layers of {options.shape}"
            options.llm = save_random_llm(replace(LLMS[options.shape], layers=options.layers), Path(folder))
        else:
            options.llm = options.llm or asset_dir("smollm2-135m")
            name, title = "train_step", options.llm.name
        machine, cases = measure_worlds("benchmarks.step_ranks", options, keys)
    path = write_results(
        name=name,
        title="What MoME adds to a training step",
        command=" ".join(["python -m benchmarks.train_step", *given]),
        machine=machine,
        sections=render(cases, title, options),
        figures=cases,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
