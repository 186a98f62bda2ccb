"""What `audio_encoder.padding` costs and changes, on real speech and the real Whisper tiny.

    python -m benchmarks.encoder_padding       needs tools/fetch_assets.py

Each clip is encoded by itself. The times are CPU time of one thread, which a busy machine changes less than the time
on the clock.

The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import soundfile
import torch

from benchmarks.measuring import machine
from benchmarks.results import RESULTS, table, write_results
from mome_dist.assets import asset_dir
from mome_dist.cli import main_guard
from mome_dist.data.media import SAMPLE_RATE
from mome_dist.speech.whisper import MAX_SECONDS, Padding, WhisperAudioEncoder

SPEECH = Path(__file__).resolve().parents[1] / "tests" / "data" / "librivox"
PADDINGS = ("30s", "clip")
WHAT = ("encoding", "spectrogram")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder_padding",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--speech", type=Path, default=SPEECH, help="folder of FLAC files at 16 kHz")
    parser.add_argument("--rounds", type=int, default=9, help="whose median counts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


@torch.no_grad()
def measure(directory: Path, speech: Path, rounds: int) -> dict[str, Any]:
    """Figures of both paddings."""
    clips = [torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in sorted(speech.glob("*.flac"))]
    encoders = {way: WhisperAudioEncoder.from_pretrained(directory, cast(Padding, way)) for way in PADDINGS}
    encoded = {way: [encoder([clip])[0] for clip in clips] for way, encoder in encoders.items()}
    whole, own = (torch.cat(encoded[way]) for way in PADDINGS)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for way, encoder in encoders.items():
        runs[way, "encoding"] = lambda encoder=encoder: [encoder([clip]) for clip in clips]  # type: ignore[misc]
        runs[way, "spectrogram"] = lambda way=way, encoder=encoder: [  # type: ignore[misc]
            encoder.log_mel([clip], MAX_SECONDS if way == "30s" else -(-len(clip) // SAMPLE_RATE)) for clip in clips
        ]
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            began = time.thread_time()
            run()
            taken[key].append((time.thread_time() - began) / len(clips))
    return {
        "clips": len(clips),
        "seconds": sum(map(len, clips)) / SAMPLE_RATE,
        "cpu seconds": {way: {what: statistics.median(taken[way, what]) for what in WHAT} for way in PADDINGS},
        "cosine": float(torch.cosine_similarity(whole, own).mean()),
        "difference": float((own - whole).norm() / whole.norm()),
    }


def render(figures: Mapping[str, Any]) -> list[str]:
    """Sections of the result file."""
    rows = [
        [
            f"`{way}`",
            f"{figures['cpu seconds'][way]['encoding'] * 1e3:.0f}",
            f"{figures['cpu seconds'][way]['spectrogram'] * 1e3:.1f}",
        ]
        for way in PADDINGS
    ]
    return [
        f"{figures['clips']} recordings of real speech, {figures['seconds'] / figures['clips']:.1f} s on average; "
        "Whisper tiny.en in fp32.",
        table(["padding", "CPU ms a clip", "of which spectrogram"], rows),
        f"{summary(figures)}.",
    ]


def summary(figures: Mapping[str, Any]) -> str:
    """How much cheaper, and how far apart."""
    whole, own = (figures["cpu seconds"][way]["encoding"] for way in PADDINGS)
    return (
        f"`clip` is {whole / own:.1f} times as cheap; its features differ from those of `30s` by "
        f"{figures['difference']:.2f} of their norm, mean cosine {figures['cosine']:.3f}"
    )


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    facts = machine()
    figures = measure(asset_dir("whisper-tiny.en"), options.speech, options.rounds)
    path = write_results(
        name="encoder_padding",
        title="Padding of Whisper's clips",
        command=" ".join(["python -m benchmarks.encoder_padding", *given]),
        machine=facts,
        sections=render(figures),
        figures=figures,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
