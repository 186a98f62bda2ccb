"""CPU seconds of Whisper's spectrogram for a second of sound: `SPECTROGRAM_SECONDS` of the planner's encoders.

python -m benchmarks.encoder_sound
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence

from mome_dist.cli import main_guard

CLIPS, SECONDS, RATE = 8, 6, 16_000  # clips of a corpus, not of the longest kind


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder_sound",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=9, help="whose median counts")
    return parser.parse_args(arguments)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on one thread and print the median."""
    options = parse_arguments(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    import numpy as np
    import torch
    from transformers import WhisperFeatureExtractor

    torch.set_num_threads(1)
    from mome_dist.speech.log_mel import LogMel

    log_mel = LogMel(WhisperFeatureExtractor(feature_size=80))
    clips = list(torch.from_numpy(np.random.default_rng(0).normal(size=(CLIPS, SECONDS * RATE)).astype(np.float32)))
    took = []
    for _ in range(options.rounds):
        began = time.process_time()
        log_mel(clips, SECONDS)
        took.append((time.process_time() - began) / (CLIPS * SECONDS))
    print(f"{statistics.median(took):.2e} s of CPU a second of sound")


if __name__ == "__main__":
    sys.exit(main())
