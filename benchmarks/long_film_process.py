"""One piece of work of `benchmarks.long_film` in a process of its own, so that its peak memory is its own.

Prints one line of JSON: seconds of CPU time, pictures, utterances, peak resident memory in bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import cv2

from benchmarks.resident import peak_resident
from mome_dist.data.films import Film
from mome_dist.data.media import SAMPLE_RATE
from mome_dist.data.preparation.clips import TRAIN, Clip
from mome_dist.data.preparation.settings import PreparationSettings
from mome_dist.data.preparation.utterances import ClipPreparer


def main() -> None:
    """Do the work and print its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", choices=("sound", "mouths"))
    parser.add_argument("film", type=Path, help="FILM.mp4, beside FILM.txt with the times of its words")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    began, pictures, utterances = time.process_time(), 0, 0
    if options.work == "sound":
        seconds = len(Film(options.film, ["audio"]).audio()) / SAMPLE_RATE
    else:
        clip = Clip("film", TRAIN, "someone", options.film, text_file=options.film.with_suffix(".txt"))
        prepared = ClipPreparer(PreparationSettings("lrs3")).prepare(clip)
        assert not prepared.rejections, prepared.rejections[0]
        pictures, utterances = prepared.frames, len(prepared.utterances)
        seconds = sum(utterance.samples for utterance in prepared.utterances) / SAMPLE_RATE
    took = time.process_time() - began
    print(
        json.dumps(
            {
                "seconds": took,
                "pictures": pictures,
                "utterances": utterances,
                "film seconds": seconds,
                "peak": peak_resident(),
            }
        )
    )


if __name__ == "__main__":
    main()
