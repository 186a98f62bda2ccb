"""What MoME costs in decoding: greedy and with beams, with it against the same without, on the frozen SmolLM2-135M.

    python -m benchmarks.decode                one process, one thread

The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import WARM_UP_ROUNDS, interleaved, machine, median_milliseconds
from benchmarks.results import RESULTS, table, write_results
from mome_dist.assets import asset_dir
from mome_dist.cli import main_guard
from mome_dist.llm.hugging_face import load_hugging_face
from mome_dist.llm.precision import fast_precision
from mome_dist.llm.tensors import embedding_scale
from mome_dist.quiet import quiet_libraries
from mome_dist.speech.projector import Projectors
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.sequence import AUDIO
from mome_dist.speech.views import View

SEARCHES = {"greedy, 1 clip": (1, 1), "greedy, 8 clips": (8, 1), "15 beams, 1 clip": (1, 15)}  # clips at once, beams
FORMS = ("LLM", "with MoME")
VIEW, FEATURE_WIDTH = View("asr", 4, None), 384
TAGS_AND_PROMPT = 10  # tokens of a prefix that are no speech
MOME_SCALE = 0.3  # of what is added to the modules' initial values, where experts add nothing yet
Search = Callable[[], list[list[int]]]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--llm", type=Path, help="directory of the frozen LLM; without it, SmolLM2-135M in the cache")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where hardware multiplies it"
    )
    parser.add_argument("--experts", type=int, default=24, help="routed experts of a layer")
    parser.add_argument("--bottleneck", type=int, default=12, help="units of an expert")
    parser.add_argument("--prefix", type=int, default=60, help="tokens of a clip before its text")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each text")
    parser.add_argument("--rounds", type=int, default=9, help="turns of both forms; the median counts")
    parser.add_argument("--warm-up", type=int, default=WARM_UP_ROUNDS, help="turns before them that do not count")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


def build(form: str, options: argparse.Namespace, precision: str) -> MoMESpeechLM:
    """The LLM with projectors; experts that add something beside the feed-forward networks, or none."""
    llm = load_hugging_face(options.llm, torch.bfloat16 if precision == "bf16" else torch.float32)
    scale, width = embedding_scale(options.llm), llm.config.hidden_size
    projectors = Projectors({"audio": FEATURE_WIDTH}, {"audio": [4]}, width, 512, per_rate=False, compression="pool")
    sizes = {"routed_experts": options.experts, "bottleneck": options.bottleneck}
    model = MoMESpeechLM(llm, projectors, "ffn", top_k=4, shared_experts=1, **sizes).eval()
    model.initialize(0, scale)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.mome.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=MOME_SCALE * parameter.shape[-1] ** -0.5)
    if form == "LLM":
        for layer in llm.model.layers:
            layer.mlp._forward_hooks.clear()  # by which a module is attached
    return model


def search_of(model: MoMESpeechLM, clips: int, beams: int, options: argparse.Namespace) -> Search:
    """Decoding of random clips, whose texts are all as long as they may be: no token of the LLM ends them."""
    speech = options.prefix - TAGS_AND_PROMPT
    generator = torch.Generator().manual_seed(2)
    audio = [torch.randn(speech * 4, FEATURE_WIDTH, generator=generator) for _ in range(clips)]
    end = model.llm.config.vocab_size
    prefix = [1, *[AUDIO] * speech, *range(2, TAGS_AND_PROMPT + 1)]

    def search() -> list[list[int]]:
        return model.generate(
            [prefix] * clips, VIEW, audio, [], eos=end, limits=[options.tokens] * clips, num_beams=beams
        )

    return search


def measure(
    models: Mapping[str, MoMESpeechLM], clips: int, beams: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each form, on the clock and of the CPU, and tokens that it writes; the forms take turns.

    A machine that does other work, too, takes more of the clock and hardly more of the CPU.
    """
    taken: dict[str, list[float]] = {form: [] for form in models}
    written: dict[str, int] = {}

    def timed(form: str, search: Search) -> Callable[[], None]:
        def run() -> None:
            start = time.process_time()
            written[form] = sum(map(len, search()))
            taken[form].append(time.process_time() - start)

        return run

    searches = {form: timed(form, search_of(model, clips, beams, options)) for form, model in models.items()}
    timings = interleaved(searches, options.rounds, warm_up=options.warm_up)
    return {
        form: {
            "milliseconds": median_milliseconds(each.host for each in timings[form]),
            "CPU milliseconds": statistics.median(taken[form][options.warm_up :]) * 1e3,
            "tokens": written[form],
        }
        for form in models
    }


def added(forms: Mapping[str, Mapping[str, float]], key: str) -> float:
    """What MoME adds, as a part of what decoding takes without it."""
    plain, mome = (forms[form][key] for form in FORMS)
    return mome / plain - 1


def render(figures: Mapping[str, Any], llm: str, options: argparse.Namespace) -> list[str]:
    """Sections of the result file: the summary and the table."""
    rows, summary = [], []
    for name, forms in figures["searches"].items():
        clock, cpu = added(forms, "milliseconds"), added(forms, "CPU milliseconds")
        for form in FORMS:
            times = [f"{forms[form][key]:.0f}" for key in ("milliseconds", "CPU milliseconds", "tokens")]
            differences = ["", ""] if form == "LLM" else [f"{clock:+.1%}", f"{cpu:+.1%}"]
            rows.append([name, form, *times, *differences])
        summary.append(f"- {name}: MoME makes decoding {clock:.1%} longer ({cpu:.1%} of CPU time)")
    columns = ["search", "model", "ms", "CPU ms", "tokens", "MoME adds", "of CPU time"]
    return [
        f"{llm}, frozen, {figures['precision']}. MoME beside the feed-forward network of every layer: "
        f"{options.experts} routed experts of {options.bottleneck} units and a shared one, K = 4. One process, one "
        f"thread; {options.prefix} tokens before each text of {options.tokens}. Without MoME, the same code decodes.",
        "\n".join(summary),
        table(columns, rows),
    ]


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    quiet_libraries()
    torch.set_num_threads(1)
    options.llm = options.llm or asset_dir("smollm2-135m")
    facts = machine()
    precision = fast_precision() if options.precision == "auto" else options.precision
    models = {form: build(form, options, precision) for form in FORMS}
    searches = {name: measure(models, *sizes, options) for name, sizes in SEARCHES.items()}
    figures = {"precision": precision, "searches": searches}
    path = write_results(
        name="decode",
        title="What MoME adds to decoding",
        command=" ".join(["python -m benchmarks.decode", *given]),
        machine=facts,
        sections=render(figures, options.llm.name, options),
        figures=figures,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
