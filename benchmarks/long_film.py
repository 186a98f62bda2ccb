"""Memory and time that a long film in 1080p takes: its sound alone, and the mouth in every picture.

    python -m benchmarks.long_film --minutes 60      needs tools/fetch_assets.py --for-tests

The film is half a minute of a real face, enlarged, over and over, with a word said every half second. The table goes to
benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from benchmarks.measuring import machine
from benchmarks.results import RESULTS, table, write_results
from mome_dist.assets import asset_dir
from mome_dist.cli import main_guard
from mome_dist.data.films import Film
from mome_dist.data.media import FPS, SAMPLE_RATE

HEIGHT, WIDTH = 1080, 1920
ROUND_SECONDS = 30
WORK = {"sound": "sound alone", "mouths": "mouth of every picture, cut into utterances"}
_WORD_SECONDS = 0.5
_MB = 1e6


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_film",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the film")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


def write_film(path: Path, seconds: float) -> None:
    """Write the film, and beside it a text file with the times of its words. One round is encoded, all are muxed."""
    round_frames = min(ROUND_SECONDS, round(seconds)) * FPS
    face = Film(asset_dir("face-video") / "carphone_pristine.mp4").video()
    turns = np.concatenate([face, face[-2:0:-1]])
    with av.open(str(path), "w", format="mp4") as container:
        picture = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "30"})
        picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        kept = []
        for number in range(round_frames):
            kept += picture.encode(_enlarged(turns[number % len(turns)], number))
        kept += [packet for packet in picture.encode(None) if packet.size]
        tick = kept[0].time_base
        times = [(packet.pts, packet.dts, packet.is_keyframe, bytes(packet)) for packet in kept]
        for turn in range(round(seconds * FPS) // round_frames):
            shift = round(turn * round_frames / FPS / tick)
            for pts, dts, is_keyframe, data in times:
                packet = av.Packet(data)
                packet.stream, packet.time_base = picture, tick
                packet.pts, packet.dts, packet.is_keyframe = (pts or 0) + shift, (dts or 0) + shift, is_keyframe
                container.mux(packet)
            hiss = np.random.default_rng(turn).normal(0, 0.1, (1, round_frames * SAMPLE_RATE // FPS))
            frame = av.AudioFrame.from_ndarray(hiss.astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, turn * hiss.shape[1]
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    starts = np.arange(0.0, seconds - _WORD_SECONDS, _WORD_SECONDS)
    rows = "".join(f"WORD {start:.2f} {start + _WORD_SECONDS * 0.8:.2f} 1.0\n" for start in starts)
    path.with_suffix(".txt").write_text(f"Text:  WORD\n\nWORD START END ASDSCORE\n{rows}", encoding="utf-8")


def _enlarged(face: np.ndarray, number: int) -> av.VideoFrame:
    height, width = face.shape
    picture = cv2.resize(face, (HEIGHT * width // height, HEIGHT), interpolation=cv2.INTER_LINEAR)
    margin = (WIDTH - picture.shape[1]) // 2
    whole = np.full((HEIGHT, WIDTH), 90, np.uint8)
    whole[:, margin : margin + picture.shape[1]] = picture
    frame = av.VideoFrame.from_ndarray(whole, format="gray").reformat(format="yuv420p")
    frame.pts = number
    return frame


def render(figures: Mapping[str, Any]) -> list[str]:
    """Sections of the result file."""
    rows = [
        [
            WORK[name],
            f"{case['film seconds'] / 60:.1f}",
            str(case["utterances"] or "-"),
            f"{case['peak'] / _MB:.0f}",
            f"{case['seconds']:.1f}",
            f"{case['seconds'] / case['pictures'] * 1e3:.2f}" if case["pictures"] else "-",
        ]
        for name, case in figures["cases"].items()
    ]
    return [
        f"A film of {figures['minutes']:g} minutes in {WIDTH}x{HEIGHT}, {figures['bytes'] / _MB:.0f} MB, each piece of "
        "work in a process of its own. Peak: the whole process with its libraries. Times: of the CPU.",
        table(["work", "minutes read", "utterances", "peak MB", "CPU s", "CPU ms a picture"], rows),
    ]


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    facts = machine()
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder) / "film.mp4"
        write_film(film, options.minutes * 60)
        cases = {}
        for work in WORK:
            command = [sys.executable, "-m", "benchmarks.long_film_process", work, str(film)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            cases[work] = json.loads(done.stdout.splitlines()[-1])
        figures = {"minutes": options.minutes, "bytes": film.stat().st_size, "cases": cases}
    path = write_results(
        name="long_film",
        title="What a long film takes",
        command=" ".join(["python -m benchmarks.long_film", *given]),
        machine=facts,
        sections=render(figures),
        figures=figures,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
