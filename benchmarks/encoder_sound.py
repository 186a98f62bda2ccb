"""CPU seconds of Whisper's spectrogram for a second of sound: `SPECTROGRAM_SECONDS` of the planner's encoders.

python -m benchmarks.encoder_sound
"""

from __future__ import annotations

import os
import statistics
import sys
import time

from mome_dist.cli import main_guard

CLIPS, SECONDS, RATE, ROUNDS = 8, 30, 16_000, 9


@main_guard
def main() -> None:
    """Measure on one thread and print the median."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import numpy as np
    import torch
    from transformers import WhisperFeatureExtractor

    torch.set_num_threads(1)
    extract = WhisperFeatureExtractor(feature_size=80)
    clips = list(np.random.default_rng(0).normal(size=(CLIPS, SECONDS * RATE)).astype(np.float32))
    took = []
    for _ in range(ROUNDS):
        began = time.process_time()
        extract(clips, sampling_rate=RATE, padding="max_length", max_length=SECONDS * RATE, return_tensors="pt")
        took.append((time.process_time() - began) / (CLIPS * SECONDS))
    print(f"{statistics.median(took):.2e} s of CPU a second of sound")


if __name__ == "__main__":
    sys.exit(main())
