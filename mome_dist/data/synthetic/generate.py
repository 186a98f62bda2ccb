"""Making a synthetic corpus: sentences x speakers -> speech -> mouth video -> shards, over several processes.

Every utterance depends only on the settings and its own id, and results are stored in order: the corpus has the same
bytes whatever the number of workers. A directory that holds a corpus of the same settings is used as it is.
"""

from __future__ import annotations

import multiprocessing
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from mome_dist.config.synthetic import SPLITS, SyntheticSettings, default_corpus_dir
from mome_dist.data.corpus import Corpus
from mome_dist.data.media import Audio, encode_flac, encode_video, frames_for_samples
from mome_dist.data.shards import MANIFEST, CorpusWriter, EncodedUtterance
from mome_dist.data.synthetic.grammar import draw_sentences
from mome_dist.data.synthetic.preview import write_contact_sheets, write_samples
from mome_dist.data.synthetic.render import render
from mome_dist.data.synthetic.speakers import Speaker, draw_speaker
from mome_dist.data.synthetic.speech import synthesise, synthesiser
from mome_dist.data.synthetic.visemes import VISEME_NAMES, blend, frame_labels
from mome_dist.errors import UserError
from mome_dist.progress import track
from mome_dist.speech.geometry import RENDERED

_UTTERANCES_PER_SHARD = 400
_JITTER = 0.05  # tempo and pitch vary by this much between utterances of a speaker
_PEAK = (0.3, 0.9)
_NOISE_LEVEL_LOG10 = (-3.5, -2.4)  # microphone hiss, relative to full scale


@dataclass(frozen=True)
class _Job:
    id: str
    split: str
    text: str
    speaker: Speaker
    backend: str
    seed: int


def _jobs(settings: SyntheticSettings) -> list[_Job]:
    """All utterances in the order of `SPLITS`; ``settings`` must be resolved."""
    voices = synthesiser(settings.backend).voices
    sentences = iter(draw_sentences(sum(settings.utterances(split) for split in SPLITS), settings.seed))
    jobs = []
    for split in SPLITS:
        speakers = [draw_speaker(split, i, voices, settings.seed) for i in range(settings.speakers(split))]
        for number in range(settings.utterances(split)):
            speaker = speakers[number % len(speakers)]
            identity = f"{split}-{number:05d}"
            jobs.append(_Job(identity, split, next(sentences), speaker, settings.backend, settings.seed))
    return jobs


def _record(audio: Audio, rng: np.random.Generator) -> Audio:
    """Set a level and add microphone hiss."""
    level = np.float32(rng.uniform(*_PEAK) / max(float(np.abs(audio).max()), 1e-6))
    hiss = np.float32(10 ** rng.uniform(*_NOISE_LEVEL_LOG10))
    return np.clip(audio * level + rng.standard_normal(len(audio), np.float32) * hiss, -1, 1)


def _make(job: _Job) -> tuple[str, EncodedUtterance]:
    """Make one utterance; return its split and its encoded form."""
    rng = np.random.default_rng([job.seed, zlib.crc32(job.id.encode())])
    voice = replace(
        job.speaker.voice,
        stretch=job.speaker.voice.stretch * rng.uniform(1 - _JITTER, 1 + _JITTER),
        pitch=job.speaker.voice.pitch * rng.uniform(1 - _JITTER, 1 + _JITTER),
    )
    speech = synthesise(job.backend, job.text, voice)
    audio = _record(speech.audio, rng)
    frames = frames_for_samples(len(audio))
    video = render(blend(speech.segments, frames), job.speaker.face, rng)
    metadata = {
        "visemes": frame_labels(speech.segments, frames),
        "voice": voice.name,
        "segments": [[round(s, 3), round(e, 3), viseme] for s, e, viseme in speech.segments],
    }
    return job.split, EncodedUtterance(
        id=job.id,
        text=job.text,
        speaker=job.speaker.id,
        samples=len(audio),
        frames=frames,
        flac=encode_flac(audio),
        mp4=encode_video(video),
        metadata=metadata,
    )


def _start_worker() -> None:
    cv2.setNumThreads(1)


def _made(jobs: list[_Job], workers: int) -> Iterator[tuple[str, EncodedUtterance]]:
    """Results in the order of ``jobs``. Workers are spawned: the caller may have threads that do not survive a fork."""
    if workers == 1:
        _start_worker()
        yield from map(_make, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker) as pool:
        yield from pool.imap(_make, jobs, chunksize=4)


def generate_corpus(settings: SyntheticSettings, out: Path | None = None, workers: int | None = None) -> Path:
    """Make the corpus of ``settings`` in ``out`` (default: `default_corpus_dir`) and return its directory.

    ``workers`` processes (default: one a core). An existing corpus of the same settings is reused at once; UserError
    when ``out`` holds anything else, when the settings cannot be met, or when no speech synthesiser is installed.
    Beside the shards lie ``contact_sheet.png``, ``visemes.png`` and ``samples/`` (test utterances with sound and text).
    """
    settings = settings.resolved()
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise UserError(f"workers is {workers}; use 1 or more")
    directory = Path(out) if out is not None else default_corpus_dir(settings)
    if directory.exists():
        _check_reusable(directory, settings)
        return directory
    jobs = _jobs(settings)
    writer = CorpusWriter(
        directory, directory.name, settings.as_dict(), VISEME_NAMES, _UTTERANCES_PER_SHARD, geometry=RENDERED
    )
    with writer:
        for split, utterance in track(_made(jobs, workers), "synthetic corpus", Console(), len(jobs), unit="clips"):
            writer.add(split, utterance)
        writer.finish()
        corpus = Corpus.open(writer.working)
        write_contact_sheets(corpus, writer.working, settings.seed)
        write_samples(corpus, writer.working / "samples")
        corpus.close()
    _check_reusable(directory, settings)  # another process may have been faster, with other settings
    return directory


def _check_reusable(directory: Path, settings: SyntheticSettings) -> None:
    if not (directory / MANIFEST).is_file():
        raise UserError(f"{directory}: exists and holds no corpus; remove it or choose another --out")
    if Corpus.open(directory).manifest.get("settings") != settings.as_dict():
        raise UserError(f"{directory}: holds a corpus of other settings; remove it or choose another --out")
