"""Films of a talking face, made of a real video and real speech, in the layouts of LRS3 and LRS2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import av
import numpy as np
import soundfile

from mome_dist.assets import asset_dir
from mome_dist.data.films.pictures import at_25_fps
from mome_dist.data.media import SAMPLE_RATE, Audio, Video, frames_for_samples, write_media_file
from mome_dist.data.preparation.alignment import Points
from mome_dist.data.preparation.mouth import plan_crops
from mome_dist.speech.geometry import AVHUBERT

SPEECH = Path(__file__).parent / "data" / "librivox"
TEXTS: dict[str, str] = json.loads((SPEECH / "transcripts.json").read_text(encoding="utf-8"))
PAUSE = 2.0  # seconds between recordings that are joined


@cache
def _film() -> Video:
    # Its pixels as they are stored, though they are wider than high: the points in tests/data were made of them.
    with av.open(str(asset_dir("face-video") / "carphone_pristine.mp4")) as container:
        return np.stack(list(at_25_fps(container.decode(video=0), 0.0, 1.0, "the film")))


def face_video(frames: int) -> Video:
    """A real face, uint8 [frames, 144, 176]: forwards and backwards in turn."""
    film = _film()
    there_and_back = np.concatenate([film, film[-2:0:-1]])
    return there_and_back[np.arange(frames) % len(there_and_back)]


def crop_mouth(video: Video, points: Points, geometry: str = AVHUBERT) -> Video:
    """The mouth in every frame of a clip whose points were found."""
    plan = plan_crops(points, geometry=geometry)
    return np.stack([plan.crop(image, frame) for frame, image in enumerate(video)])


@cache
def speech(name: str) -> Audio:
    """A recording of real speech: float32 [samples] at 16 kHz."""
    audio, rate = soundfile.read(SPEECH / f"{name}.flac", dtype="float32")
    assert rate == SAMPLE_RATE
    return audio


def joined(names: Sequence[str]) -> tuple[Audio, list[tuple[str, float, float]]]:
    """Recordings one after the other, and when each word is said (about: evenly over its recording)."""
    pieces: list[Audio] = []
    words: list[tuple[str, float, float]] = []
    start = 0.0
    for name in names:
        audio, text = speech(name), TEXTS[name].split()
        each = len(audio) / SAMPLE_RATE / len(text)
        words += [(word, start + i * each, start + (i + 0.9) * each) for i, word in enumerate(text)]
        pieces += [audio, np.zeros(round(PAUSE * SAMPLE_RATE), np.float32)]
        start += len(audio) / SAMPLE_RATE + PAUSE
    return np.concatenate(pieces[:-1]), words


def write_clip(stem: Path, text: str, audio: Audio, video: Video | None = None) -> None:
    """``STEM.mp4`` and ``STEM.txt`` as in LRS2 and LRS3; without ``video``, a face as long as the sound."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    video = face_video(frames_for_samples(len(audio))) if video is None else video
    write_media_file(stem.with_suffix(".mp4"), audio, video)
    stem.with_suffix(".txt").write_text(f"Text:  {text.upper()}\nConf:  4\nRef:  xyz\n", encoding="utf-8")


def write_long_clip(stem: Path, names: Sequence[str]) -> None:
    """A clip of several recordings with a table of words, as in the pre-training sets."""
    audio, words = joined(names)
    text = " {LG} ".join(TEXTS[name] for name in names)
    write_clip(stem, text, audio)
    rows = [f"{word.upper()} {start:.2f} {end:.2f} 5.1" for word, start, end in words]
    table = "\n".join(["", "WORD START END ASDSCORE", *rows, ""])
    with stem.with_suffix(".txt").open("a", encoding="utf-8") as file:
        file.write(table)


def write_lrs3(root: Path) -> Path:
    """An LRS3-shaped tree: one long clip, five others, all sound; four speakers in training, one in the test."""
    write_long_clip(root / "pretrain/speaker0/00001", ["0870", "0920", "0890"])
    write_clip(root / "pretrain/speaker1/00001", TEXTS["0880"], speech("0880"))
    write_clip(root / "trainval/speaker1/50001", TEXTS["0930"], speech("0930"))
    write_clip(root / "trainval/speaker2/50001", TEXTS["0880"], speech("0880"))
    write_clip(root / "trainval/speaker3/50001", TEXTS["0930"], speech("0930"))
    write_clip(root / "test/speaker4/00001", TEXTS["0930"], speech("0930"))
    return root


def write_lrs2(root: Path) -> Path:
    """An LRS2-shaped tree with its four lists."""
    videos = root / "mvlrs_v1"
    write_long_clip(videos / "pretrain/100/00001", ["0880", "0930"])
    for programme, name in (("101", "0880"), ("102", "0930"), ("103", "0880")):
        write_clip(videos / f"main/{programme}/00001", TEXTS[name], speech(name))
    lists = {"pretrain": "100/00001", "train": "101/00001", "val": "102/00001", "test": "103/00001 NF"}
    for name, line in lists.items():
        (root / f"{name}.txt").write_text(f"{line}\n", encoding="utf-8")
    return root


def write_lists(root: Path) -> Path:
    """Two films, each in a list of another kind: ``train.csv`` of auto_avsr, ``test.tsv`` of av_hubert."""
    write_clip(root / "films/ann/1", "", speech("0880"))
    write_clip(root / "films/bob/1", "", speech("0930"))
    (root / "train.csv").write_text(f"films,ann/1.mp4,75,,{TEXTS['0880']}\n", encoding="utf-8")
    (root / "test.tsv").write_text("/\nbob-1\tfilms/bob/1.mp4\tfilms/bob/1.mp4\t83\t52640\n", encoding="utf-8")
    (root / "test.wrd").write_text(f"{TEXTS['0930']}\n", encoding="utf-8")
    return root
