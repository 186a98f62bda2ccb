"""How fast one core reads clips from their shards and augments them, in multiples of real time.

    python -m benchmarks.data_speed            on a small synthetic corpus that it makes

The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import soundfile
import torch

from benchmarks.measuring import interleaved, machine
from benchmarks.results import RESULTS, table, write_results
from mome_dist.cli import main_guard
from mome_dist.config.schema import AugmentationConfig, NoiseConfig, TimeMaskConfig
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import SAMPLE_RATE
from mome_dist.data.synthetic import SyntheticSettings, generate_corpus
from mome_dist.data.transforms import CORRUPTIONS, Augmentation, corrupt

SETTINGS = SyntheticSettings(train=48, validation=1, test=1, train_speakers=12, validation_speakers=1, test_speakers=1)
RECORDING_RATE, RECORDING_SECONDS = 44_100, 60
EVERYTHING = "audio and video, decoded and augmented"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_speed",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--corpus", type=Path, help="a corpus whose training split is read; by default one is made")
    parser.add_argument("--clips", type=int, default=48, help="clips of the training split to read")
    parser.add_argument("--rounds", type=int, default=5, help="that count; two first ones do not")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


def candidates(corpus: Corpus, recordings: Path) -> dict[str, Callable[[Utterance], object]]:
    """What is timed, each for one utterance."""
    paper = AugmentationConfig(
        crop=88,
        flip=0.5,
        video_time_mask=TimeMaskConfig(10, 25),
        audio_time_mask=TimeMaskConfig(6400, 16_000),
        noise=NoiseConfig("babble", snr=[0.0]),
    )
    recorded = AugmentationConfig(noise=NoiseConfig(str(recordings), snr=[0.0]))
    masked = AugmentationConfig(audio_time_mask=paper.audio_time_mask)
    with_babble, with_recordings, with_mask = (
        Augmentation.open(settings, corpus, "train", 0) for settings in (paper, recorded, masked)
    )

    def augmented(augmentation: Augmentation, utterance: Utterance) -> None:
        augmentation.audio(corpus.audio(utterance), utterance, 0)

    def everything(utterance: Utterance) -> None:
        augmented(with_babble, utterance)
        with_babble.video(corpus.video(utterance), utterance, 0)

    found: dict[str, Callable[[Utterance], object]] = {
        "audio decoded": corpus.audio,
        "audio, time mask": lambda utterance: augmented(with_mask, utterance),
        "audio, time mask, babble of 8": lambda utterance: augmented(with_babble, utterance),
        "audio, recorded noise at 44.1 kHz": lambda utterance: augmented(with_recordings, utterance),
        "video decoded": corpus.video,
        "video, crop, flip, time mask": lambda u: with_babble.video(corpus.video(u), u, 0),
        EVERYTHING: everything,
    }
    for kind in CORRUPTIONS:
        found[f"video, {kind}"] = lambda u, kind=kind: corrupt(corpus.video(u), kind, 0.5, u.id)  # type: ignore[misc]
    return found


def measure(
    todo: Mapping[str, Callable[[Utterance], object]], utterances: Sequence[Utterance], rounds: int
) -> dict[str, float]:
    """Median seconds that each candidate takes for all utterances; the candidates take turns."""

    def over_all(candidate: Callable[[Utterance], object]) -> Callable[[], None]:
        def run() -> None:
            for utterance in utterances:
                candidate(utterance)

        return run

    timings = interleaved({name: over_all(candidate) for name, candidate in todo.items()}, rounds)
    return {name: statistics.median(each.host for each in taken) for name, taken in timings.items()}


def render(figures: Mapping[str, Any]) -> list[str]:
    """Sections of the result file."""
    clips, speech = figures["clips"], figures["seconds of speech"]
    rows = [
        [name, f"{seconds / clips * 1e3:.1f}", f"{speech / seconds:.0f}"]
        for name, seconds in figures["seconds"].items()
    ]
    return [
        f"{clips} clips of {speech / clips:.1f} s on average, 16 kHz FLAC and 96 x 96 H.264 at 25 frames a second, "
        "each read from its shard with its checksum. One process, one thread.",
        table(["what is done to a clip", "ms a clip", "times real time"], rows),
    ]


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    facts = machine()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus.open(options.corpus or generate_corpus(SETTINGS, Path(folder) / "corpus"))
        recordings = Path(folder) / "noise"
        recordings.mkdir()
        hiss = np.random.default_rng(0).normal(0, 0.1, (RECORDING_RATE * RECORDING_SECONDS, 2)).astype(np.float32)
        soundfile.write(recordings / "hiss.flac", hiss, RECORDING_RATE)
        utterances = corpus.split("train")[: options.clips]
        seconds = measure(candidates(corpus, recordings), utterances, options.rounds)
    figures = {
        "clips": len(utterances),
        "seconds of speech": sum(utterance.samples for utterance in utterances) / SAMPLE_RATE,
        "seconds": seconds,
    }
    path = write_results(
        name="data_speed",
        title="How fast one core reads and augments clips",
        command=" ".join(["python -m benchmarks.data_speed", *given]),
        machine=facts,
        sections=render(figures),
        figures=figures,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
