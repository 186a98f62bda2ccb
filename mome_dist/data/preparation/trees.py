"""The folders of LRS3 and LRS2, as their owners hand them out.

LRS3: ``pretrain/SPEAKER/NNNNN.{mp4,txt}``, ``trainval/...``, ``test/...``. It has no validation split: one is made of
speakers of ``trainval`` (`clips.hold_out_speakers`).
LRS2: ``mvlrs_v1/{main,pretrain}/PROGRAMME/NNNNN.{mp4,txt}`` beside lists ``pretrain.txt, train.txt, val.txt,
test.txt``, whose lines name ``PROGRAMME/NNNNN`` (and ``NF`` or ``MV`` in the last).
"""

from __future__ import annotations

from pathlib import Path

from mome_dist.data.preparation.clips import TEST, TRAIN, VALIDATION, Clip, below
from mome_dist.errors import UserError
from mome_dist.text_files import lines_of

_LRS3_FOLDERS = {"pretrain": TRAIN, "trainval": TRAIN, "test": TEST}
_LRS2_LISTS = {"pretrain": TRAIN, "train": TRAIN, "val": VALIDATION, "test": TEST}
_LRS2_VIDEOS = "mvlrs_v1"

LRS3_VALIDATION = "trainval/"
"""Names of the clips that LRS3's validation split may be made of start so."""


def lrs3_clips(root: Path) -> list[Clip]:
    """Clips of an LRS3 tree, sorted by name, those of ``trainval`` in the training split.

    Raises:
        UserError: a folder is missing or empty.
    """
    clips = []
    for folder, split in _LRS3_FOLDERS.items():
        directory = root / folder
        if not directory.is_dir():
            raise UserError(f"{directory} is missing: give the folder that holds pretrain, trainval and test of LRS3")
        texts = sorted(directory.glob("*/*.txt"))
        if not texts:
            raise UserError(f"{directory} holds no SPEAKER/NNNNN.txt: unpack LRS3's text files beside the videos")
        clips += [_clip(root, text, split) for text in texts]
    return clips


def lrs2_clips(root: Path) -> list[Clip]:
    """Clips of an LRS2 tree in the order of its lists.

    Raises:
        UserError: a list or the videos are missing, or a line names no clip.
    """
    clips = []
    for name, split in _LRS2_LISTS.items():
        path = root / f"{name}.txt"
        directory = root / _LRS2_VIDEOS / ("pretrain" if name == "pretrain" else "main")
        if not path.is_file() or not directory.is_dir():
            missing = path if not path.is_file() else directory
            raise UserError(f"{missing} is missing: give the folder that holds {_LRS2_VIDEOS} and LRS2's lists")
        for number, line in enumerate(lines_of(path), 1):
            if words := line.split():
                text = below(directory, f"{words[0]}.txt", f"{path}:{number}")
                clips.append(_clip(root / _LRS2_VIDEOS, text, split))
    return clips


def _clip(root: Path, text: Path, split: str) -> Clip:
    name = text.relative_to(root).with_suffix("").as_posix()
    return Clip(name, split, text.parent.name, text.with_suffix(".mp4"), text_file=text)
