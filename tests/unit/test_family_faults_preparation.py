"""Faults of public code of this family that a preparation could have: each check passes here, and fails where the
fault is planted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mome_dist.data.preparation import command, mouth
from mome_dist.data.preparation.clips import TEST, VALIDATION, Clip
from mome_dist.data.preparation.command import Part, Request, clips_of
from mome_dist.data.preparation.landmarks import POINTS
from mome_dist.data.preparation.settings import PreparationSettings
from mome_dist.errors import UserError


@pytest.fixture
def lrs3(tmp_path: Path) -> Path:
    """The texts of an LRS3-shaped tree: nothing else is read when splits are made."""
    for folder, speakers in (("pretrain", 6), ("trainval", 6), ("test", 3)):
        for number in range(speakers):
            path = tmp_path / "lrs3" / folder / f"{folder[:4] if folder == 'test' else 'talk'}{number}" / "00001.txt"
            path.parent.mkdir(parents=True)
            path.write_text("Text:  A\n")
    return tmp_path / "lrs3"


# --- 1: a zero that reads as "not set" -----------------------------------------------------------------------------


def check_that_zero_is_a_limit(root: Path) -> None:
    """No gap is bridged with a limit of 0, and no speaker is held out with a share of 0."""
    points = np.zeros((5, len(POINTS), 2), np.float32)
    points[2] = np.nan
    with pytest.raises(mouth.NoFaceError):
        mouth.fill_gaps(points, 0)
    settings = PreparationSettings("lrs3", validation_share=0)
    preparation = clips_of(Request(root, root / "out", {}, settings, 1, Part(0, 1)))
    assert not [clip for clip in preparation.clips if clip.split == VALIDATION]


def test_fault_01_zero_is_a_limit(lrs3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_zero_is_a_limit(lrs3)
    right = mouth.fill_gaps
    monkeypatch.setattr(mouth, "fill_gaps", lambda points, longest: right(points, longest or mouth.LONGEST_GAP))
    with pytest.raises(pytest.fail.Exception):
        check_that_zero_is_a_limit(lrs3)


# --- 7: validation on the test split -------------------------------------------------------------------------------


def check_that_validation_is_not_the_test(root: Path) -> None:
    """Validation clips are of trainval, and their speakers are in no other split."""
    settings = PreparationSettings("lrs3", validation_share=0.3)
    clips = clips_of(Request(root, root / "out", {}, settings, 1, Part(0, 1))).clips
    validation = [clip for clip in clips if clip.split == VALIDATION]
    assert validation and all(clip.media.is_relative_to(root / "trainval") for clip in validation)
    others = {clip.speaker for clip in clips if clip.split != VALIDATION}
    assert not {clip.speaker for clip in validation} & others
    assert len([clip for clip in clips if clip.split == TEST]) == 3


def _test_as_validation(clips: Iterable[Clip], *_: object) -> tuple[list[Clip], list[Clip]]:
    clips = list(clips)
    return [*clips, *(replace(clip, split=VALIDATION) for clip in clips if clip.split == TEST)], []


def _by_clip(clips: Iterable[Clip], *_: object) -> tuple[list[Clip], list[Clip]]:
    """Every third clip of trainval, whoever speaks in it."""
    trainval = [clip for clip in clips if clip.name.startswith("trainval")][::3]
    return [replace(clip, split=VALIDATION) if clip in trainval else clip for clip in clips], []


@pytest.mark.parametrize("planted", [_test_as_validation, _by_clip])
def test_fault_07_validation_is_not_the_test(lrs3: Path, monkeypatch: pytest.MonkeyPatch, planted: object) -> None:
    check_that_validation_is_not_the_test(lrs3)
    monkeypatch.setattr(command, "hold_out_speakers", planted)
    with pytest.raises((AssertionError, UserError)):
        check_that_validation_is_not_the_test(lrs3)


def check_that_a_test_list_validates_nothing(folder: Path) -> None:
    """The same clips may not be listed for the test and for validation or training."""
    path = folder / "test.csv"
    path.write_text(",s/a.mp4,1,,x\n")
    for split in ("train", VALIDATION):
        lists = {split: path, TEST: path}
        with pytest.raises(UserError, match=r"twice|must be unseen"):
            clips_of(Request(folder, folder / "out", lists, PreparationSettings("manifests"), 1, Part(0, 1)))


def test_fault_07_a_test_list_validates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_a_test_list_validates_nothing(tmp_path)
    monkeypatch.setattr(command, "check_clips", lambda clips: None)
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        check_that_a_test_list_validates_nothing(tmp_path)
