"""Command: what is said in audio and video files.

    mome-dist transcribe runs/quickstart CLIP.mp4 --audio-rate 4                     speech alone
    mome-dist transcribe runs/quickstart CLIP.mp4 --video-rate 2                     lips alone
    mome-dist transcribe runs/quickstart CLIP.mp4 --audio-rate 4 --video-rate 2      both
    mome-dist transcribe runs/quickstart FILM.mp4 --audio-rate 4 --format srt        subtitles of a film of any length
    mome-dist transcribe runs/quickstart FILMS --audio-rate 4 --output TEXTS --format srt,json     of a whole folder

The first argument is a run, one checkpoint of it, or an export (`mome-dist export`), which needs nothing else of it;
then come files, folders or patterns. What is said in one film goes to stdout, and nothing else does; that of several
goes to a folder, a file each. Where the video shows a face, its mouth is found and cropped first; 96x96 mouth crops, as
in a corpus, are taken as they are. A film of more than --longest seconds is cut where nobody speaks.

A film that cannot be read does not stop the others: the end says which they were, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mome_dist.cli import Parser, add_frozen_options, command_parser, frozen_of, main_guard
from mome_dist.config.derived import views_of
from mome_dist.config.models import config_of_trained
from mome_dist.data.films import film_with
from mome_dist.errors import UserError
from mome_dist.evaluation.checks import check_view
from mome_dist.exit_codes import USER_ERROR
from mome_dist.hints import did_you_mean, near
from mome_dist.quiet import quiet_libraries
from mome_dist.speech.views import View, streams_read, view_of
from mome_dist.trained import find_trained, place_argument
from mome_dist.transcription.places import Place, films_at
from mome_dist.transcription.results import LONGEST
from mome_dist.transcription.subtitles import FORMATS

if TYPE_CHECKING:
    from rich.console import Console

    from mome_dist.config import RunConfig
    from mome_dist.inference.load import LoadedRun
    from mome_dist.transcription.model import SpeechModel
    from mome_dist.transcription.reading import FilmReading
    from mome_dist.transcription.results import Transcript
    from mome_dist.transcription.words import WordAligner

ENCODER_SECONDS = 30.0  # that Whisper reads at once


def _formats(word: str) -> list[str]:
    names = [name for name in word.split(",") if name]
    for name in names or [word]:
        if name not in FORMATS:
            meant = did_you_mean(near(name, FORMATS))
            raise argparse.ArgumentTypeError(f"{name!r} is no format{meant}: choose from {', '.join(FORMATS)}")
    return list(dict.fromkeys(names))


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("transcribe", __doc__)
    parser.add_argument("run", type=place_argument, help="run directory, one checkpoint of it, or an export")
    parser.add_argument("files", nargs="*", metavar="FILE", help="audio or video files, folders of them, or patterns")
    parser.add_argument("--list", type=Path, metavar="TXT", help="a text file that names one of these a line")
    parser.add_argument("--audio-rate", type=int, metavar="A", help="audio frames (50 a second) per token")
    parser.add_argument("--video-rate", type=int, metavar="V", help="video frames (25 a second) per token")
    parser.add_argument("--num-beams", type=int, metavar="N", help="1 is greedy search (default: as the run has it)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for a file each; needed for several films")
    parser.add_argument(
        "--format",
        type=_formats,
        default=["txt"],
        metavar="NAMES",
        help=f"of {', '.join(FORMATS)}, with commas between them (default: txt)",
    )
    parser.add_argument(
        "--longest",
        type=float,
        default=LONGEST,
        metavar="SECONDS",
        help=f"that are read at once; a longer film is cut at pauses (default: {LONGEST:g})",
    )
    add_frozen_options(parser)
    return parser


def _films(options: argparse.Namespace) -> list[Place]:
    """The films that are named, after a glance at the options."""
    if options.num_beams is not None and options.num_beams < 1:
        raise UserError(f"--num-beams {options.num_beams} must be at least 1.")
    if not 1 <= options.longest <= ENCODER_SECONDS:
        raise UserError(f"--longest {options.longest:g} must be from 1 to {ENCODER_SECONDS:g} seconds.")
    places = films_at(options.files, options.list)
    if options.output is None:
        if len(places) > 1:
            raise UserError(f"{len(places)} films are named: give --output DIR for their texts.")
        if len(options.format) > 1:
            raise UserError(f"--format {','.join(options.format)} is more than one text: give --output DIR.")
    return places


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and write the texts."""
    options = command_line().parse_args(arguments)
    places = _films(options)
    view = view_of(options.audio_rate, options.video_rate)
    config = config_of_trained(find_trained(options.run))
    check_view(config, view, "rates")
    if options.output is None:
        film_with(places[0].film, streams_read([view]))  # says what is wrong before anything heavy is imported
    if view not in (trained := views_of(config)):
        print(f"note: {view} was not trained; trained: {', '.join(map(str, trained))}.", file=sys.stderr, flush=True)

    quiet_libraries()
    from rich.console import Console

    from mome_dist.inference.load import load_run
    from mome_dist.transcription.model import SpeechModel, device_of
    from mome_dist.transcription.reading import FilmReading

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    begun: list[FilmReading] = []

    def read_film(config: RunConfig) -> None:
        """Read the film before any model is loaded: it is quick."""
        if options.output is None:
            begun.append(FilmReading(config, places[0].film, view, options.longest).begin())

    run = load_run(options.run, device_of(None), frozen=frozen_of(options), check=read_film)
    named = f"{run.config.name}, step {run.step}, {view}{'' if view in trained else ' (not trained)'}"
    aligner = _aligner(run, view, console) if set(options.format) - {"txt"} else None
    work = _Work(options, view, SpeechModel(run), aligner, console)
    started = time.perf_counter()
    if options.output is None:
        found = work.transcribe(begun[0], shown=console.is_terminal)
        console.print(f"{named}: {found.seconds:.2f} s of film, {time.perf_counter() - started:.2f} s", markup=False)
        print(FORMATS[options.format[0]](found), end="", flush=True)
        return 0
    seconds, failed = work.write(places)
    done, took = len(places) - len(failed), time.perf_counter() - started
    console.print(
        f"{named}: {done} of {len(places)} films, {seconds:.0f} s, in {options.output}; {took:.0f} s", markup=False
    )
    for film in failed:
        console.print(f"not written: {film}", markup=False)
    return USER_ERROR if failed else 0


def _aligner(run: LoadedRun, view: View, console: Console) -> WordAligner | None:
    """What finds the times of words, where there is sound to find them in."""
    from mome_dist.transcription.words import WordAligner

    if view.audio_rate is None:
        return None
    try:
        return WordAligner(run.config.audio_encoder.path, run.device)
    except UserError as error:
        console.print(f"note: {error}", markup=False)
        return None


@dataclass(frozen=True)
class _Work:
    """A loaded model, and what is asked of it."""

    options: argparse.Namespace
    view: View
    model: SpeechModel
    aligner: WordAligner | None
    console: Console

    def transcribe(self, film: FilmReading, shown: bool) -> Transcript:
        """What is said in one film; ``shown`` draws how far it has come."""
        from mome_dist.progress import progress
        from mome_dist.transcription.films import transcribe_reading

        with progress(self.console if shown else None, "transcribing", round(film.seconds), unit="seconds") as bar:
            found = transcribe_reading(
                self.model,
                film,
                num_beams=self.options.num_beams,
                log_probs=bool({"json", "jsonl"} & set(self.options.format)),
                align=self.aligner,
                heard=lambda done: bar.update(round(done)),
            )
        for note in found.notes:
            self.console.print(f"{film.path}: {note}", markup=False)
        return found

    def write(self, places: Sequence[Place]) -> tuple[float, list[Path]]:
        """A file of each film in each format; returns seconds of film, and films that could not be read."""
        from mome_dist.files import write_text
        from mome_dist.progress import track
        from mome_dist.transcription.reading import FilmReading

        seconds, failed = 0.0, list[Path]()
        for film, name in track(places, "transcribing", self.console, unit="films"):
            try:
                reading = FilmReading(self.model.run.config, film, self.view, self.options.longest)
                found = self.transcribe(reading, shown=False)
            except UserError as error:
                failed.append(film)
                self.console.print(f"error: {error}", markup=False)
                continue
            seconds += found.seconds
            for form in self.options.format:
                path = self.options.output / f"{name}.{form}"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, FORMATS[form](found))
        return seconds, failed


if __name__ == "__main__":
    sys.exit(main())
