"""What a person looks at: contact sheets of mouths, and test utterances as ordinary video files with sound."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import Video, write_media_file
from mome_dist.data.synthetic.render import SIZE, render
from mome_dist.data.synthetic.speakers import draw_speaker
from mome_dist.data.synthetic.visemes import TARGETS
from mome_dist.files import write_text

_ROWS, _COLUMNS = 8, 12
_SAMPLES = 3
_VISEME_COLUMNS = 12


def _write_png(path: Path, image: Video) -> None:
    done, data = cv2.imencode(".png", image)
    assert done, "libpng encodes any grey picture"
    path.write_bytes(data.tobytes())


def _first_of_each_speaker(utterances: list[Utterance], count: int) -> list[Utterance]:
    first: dict[str, Utterance] = {}
    for utterance in utterances:
        first.setdefault(utterance.speaker, utterance)
    return list(first.values())[:count]


def write_contact_sheets(corpus: Corpus, directory: Path, seed: int) -> None:
    """Write ``contact_sheet.png`` (a row a speaker, evenly spaced frames) and ``visemes.png`` (every target pose)."""
    rows = []
    for utterance in _first_of_each_speaker(corpus.split("train"), _ROWS):
        video = corpus.video(utterance)
        rows.append(np.hstack(list(video[np.linspace(0, len(video) - 1, _COLUMNS).astype(int)])))
    _write_png(directory / "contact_sheet.png", np.vstack(rows))

    poses = []
    for index in range(2):
        face = draw_speaker("train", index, ("any",), seed).face
        for name, target in TARGETS.items():
            track = np.array([target[:-1]], np.float32)
            image = render(track, face, np.random.default_rng(seed))[0]
            cv2.putText(image, name, (2, 10), cv2.FONT_HERSHEY_SIMPLEX, 0.35, 255.0, 1, cv2.LINE_AA)
            poses.append(image)
        poses += [np.zeros((SIZE, SIZE), np.uint8)] * (-len(poses) % _VISEME_COLUMNS)
    grid = [np.hstack(poses[i : i + _VISEME_COLUMNS]) for i in range(0, len(poses), _VISEME_COLUMNS)]
    _write_png(directory / "visemes.png", np.vstack(grid))


def write_samples(corpus: Corpus, directory: Path) -> None:
    """Write the first test utterances as ``{id}.mp4`` with sound, and what is said as ``{id}.txt``."""
    directory.mkdir()
    for utterance in corpus.split("test")[:_SAMPLES]:
        write_media_file(directory / f"{utterance.id}.mp4", corpus.audio(utterance), corpus.video(utterance))
        write_text(directory / f"{utterance.id}.txt", utterance.text + "\n")
