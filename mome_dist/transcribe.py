"""Command: what is said in one audio or video file.

    mome-dist transcribe runs/quickstart CLIP.mp4 --audio-rate 4                     speech alone
    mome-dist transcribe runs/quickstart CLIP.mp4 --video-rate 2                     lips alone
    mome-dist transcribe runs/quickstart CLIP.mp4 --audio-rate 4 --video-rate 2      both

The first argument is a run, one checkpoint of it, or an export (`mome-dist export`), which needs nothing else of it.
The text goes to stdout and nothing else does. Where the video shows a face, its mouth is found and cropped first;
96x96 mouth crops, as in a corpus, are taken as they are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, add_frozen_options, command_parser, frozen_of, main_guard
from mome_dist.config.derived import views_of
from mome_dist.config.models import config_of_trained
from mome_dist.data.films import film_with
from mome_dist.errors import UserError
from mome_dist.evaluation.checks import check_view
from mome_dist.quiet import quiet_libraries
from mome_dist.speech.views import streams_read, view_of
from mome_dist.trained import find_trained, place_argument


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("transcribe", __doc__)
    parser.add_argument("run", type=place_argument, help="run directory, one checkpoint of it, or an export")
    parser.add_argument("file", type=Path, help="audio or video file")
    parser.add_argument("--audio-rate", type=int, metavar="A", help="audio frames (50 a second) per token")
    parser.add_argument("--video-rate", type=int, metavar="V", help="video frames (25 a second) per token")
    parser.add_argument("--num-beams", type=int, metavar="N", help="1 is greedy search (default: as the run has it)")
    add_frozen_options(parser)
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and print the text."""
    options = command_line().parse_args(arguments)
    view = view_of(options.audio_rate, options.video_rate)
    if options.num_beams is not None and options.num_beams < 1:
        raise UserError(f"--num-beams {options.num_beams} must be at least 1.")
    config = config_of_trained(find_trained(options.run))
    check_view(config, view, "rates")
    if view not in (trained := views_of(config)):
        print(f"note: {view} was not trained; trained: {', '.join(map(str, trained))}.", file=sys.stderr, flush=True)
    film_with(options.file, streams_read([view]))

    quiet_libraries()
    from rich.console import Console

    from mome_dist.config import RunConfig
    from mome_dist.inference.load import load_run
    from mome_dist.transcription.inputs import Clip, film_clip
    from mome_dist.transcription.model import SpeechModel, device_of

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    read: list[Clip] = []

    def read_film(config: RunConfig) -> None:
        """Read the file before any model is loaded: it is quick."""
        read.append(film_clip(options.file, streams_read([view]), config))
        for note in read[0].notes:
            console.print(note)

    run = load_run(options.run, device_of(None), frozen=frozen_of(options), check=read_film)
    started = time.perf_counter()
    said = SpeechModel(run).transcribe(
        read[0],
        audio_rate=view.audio_rate,
        video_rate=view.video_rate,
        num_beams=options.num_beams,
        log_probs=False,
    )
    lengths = ", ".join(f"{value:.2f} s of {stream}" for stream, value in read[0].seconds.items())
    named = f"{run.config.name}, step {run.step}, {view}{'' if view in trained else ' (not trained)'}"
    console.print(f"{named}: {lengths}, {time.perf_counter() - started:.2f} s")
    print(said.text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
