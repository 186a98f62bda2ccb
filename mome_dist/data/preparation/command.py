"""The command `mome-dist prepare`: which clips, which part of them, and what is told."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from mome_dist.data.corpus import Corpus
from mome_dist.data.preparation.clips import SPLITS, TRAIN, VALIDATION, Clip, check_clips, hold_out_speakers
from mome_dist.data.preparation.manifests import read_manifest
from mome_dist.data.preparation.portions import NOTED, REJECTED, Preparation
from mome_dist.data.preparation.settings import PreparationSettings
from mome_dist.data.preparation.trees import LRS3_VALIDATION, lrs2_clips, lrs3_clips
from mome_dist.data.preparation.utterances import Rejection, held_out
from mome_dist.data.preparation.workers import do_portions
from mome_dist.errors import UserError, no_folder


class Part(NamedTuple):
    """Part ``number`` (from 0 on) of ``parts`` that share the portions."""

    number: int
    parts: int


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        root: of the data set; None for lists that name their own.
        out: directory of the corpus.
        lists: files by split, for source manifests.
        settings: see there.
        workers: processes.
        part: of the portions.
        merge_only: whether to prepare nothing and only join what is done.
    """

    root: Path | None
    out: Path
    lists: Mapping[str, Path]
    settings: PreparationSettings
    workers: int
    part: Part
    merge_only: bool = False


def part_of(text: str | None, environment: Mapping[str, str]) -> Part:
    """The part that ``--part I/N`` (from 1 on) or else the environment of a Slurm job array asks for; else all.

    Raises:
        UserError: no such part.
    """
    if text is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--part {text}: give I/N, such as 1/8 for the first of eight parts")
        return Part(int(found[1]) - 1, int(found[2]))
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return Part(0, 1)
    task, least, step, count = (
        int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", ""), ("MIN", "0"), ("STEP", "1"), ("COUNT", "1"))
    )
    part = Part((task - least) // max(step, 1), count)
    if part.number >= count:
        raise UserError(f"array task {task}: submit tasks without gaps, such as --array=0-{count - 1}")
    return part


def clips_of(request: Request) -> Preparation:
    """Find the clips of a data set and decide on its splits, without reading any film.

    Raises:
        UserError: the data set is not laid out as it should be, or its splits would spoil an evaluation.
    """
    settings = request.settings
    eligible = ""
    rejected: list[Rejection] = []
    if settings.source == "manifests":
        listed = [read_manifest(path, split, request.root) for split, path in request.lists.items()]
        clips = [clip for each in listed for clip in each.clips]
        rejected = [rejection for each in listed for rejection in each.left_out]
    else:
        assert request.root is not None
        if not request.root.is_dir():
            raise UserError(f"{request.root} {no_folder(request.root)}; give the root of the data set")
        clips = lrs3_clips(request.root) if settings.source == "lrs3" else lrs2_clips(request.root)
        eligible = LRS3_VALIDATION if settings.source == "lrs3" else ""
    check_clips(clips)
    left_out: list[Clip] = []
    splits = {clip.split for clip in clips}
    if TRAIN in splits and VALIDATION not in splits and settings.validation_share:
        clips, left_out = hold_out_speakers(clips, settings.validation_share, eligible)
        check_clips(clips)
    if settings.limit is not None:
        clips = [clip for split in SPLITS for clip in [c for c in clips if c.split == split][: settings.limit]]
    return Preparation(request.out, settings, tuple(clips), (*rejected, *held_out(left_out)))


def prepare_command(request: Request, console: Console) -> None:
    """Prepare a part of a data set; join all parts if they are done. Prints what was made and what was left out.

    Raises:
        UserError: see `clips_of`; or OUT is in use for something else, or MediaPipe is missing.
    """
    if request.workers < 1:
        raise UserError(f"--workers {request.workers}: use 1 or more")
    preparation = clips_of(request)
    console.print(_found(preparation.clips), soft_wrap=True)
    if preparation.is_done():
        preparation.finish()  # clears what a killed one may have left beside it
        console.print("reused: a corpus of the same clips and settings was there")
    elif request.merge_only:
        if not preparation.finish():
            missing = preparation.missing()
            raise UserError(f"{len(missing)} portions are not done yet, {missing[0].name} first; prepare them")
    else:
        preparation.begin()
        _do_part(preparation, request, console)
        if not preparation.finish():
            console.print(f"{len(preparation.missing())} portions are left to other parts, the last of which joins all")
            return
    _tell(preparation.out, console)


def _do_part(preparation: Preparation, request: Request, console: Console) -> None:
    numbered = {portion.name: number for number, portion in enumerate(preparation.portions)}
    todo = preparation.missing()
    mine = [portion for portion in todo if numbered[portion.name] % request.part.parts == request.part.number]
    if len(todo) < len(numbered):
        console.print(f"{len(numbered) - len(todo)} of {len(numbered)} portions were done before")
    if not mine:
        return
    began = time.monotonic()
    frames = do_portions(preparation, mine, request.workers, console)
    seconds = time.monotonic() - began
    workers = min(request.workers, len(mine))
    speed = frames / seconds / workers
    console.print(f"{frames} frames in {seconds:.1f} s by {workers} worker(s): {speed:.0f} frames/s each")


def _found(clips: Sequence[Clip]) -> str:
    counts = Counter(clip.split for clip in clips)
    speakers = {split: len({clip.speaker for clip in clips if clip.split == split}) for split in counts}
    return ", ".join(
        f"{split}: {counts[split]} clips of {speakers[split]} speakers" for split in SPLITS if counts[split]
    )


def _tell(out: Path, console: Console) -> None:
    """Print the figures of a corpus, why clips are not in it, and its directory as the last line."""
    corpus = Corpus.open(out)
    for name in corpus.split_names:
        entry = corpus.manifest["splits"][name]
        console.print(f"{name:<11}{entry['utterances']:>7} utterances {entry['seconds'] / 3600:>9.3f} h")
    rejected = (out / REJECTED).read_text(encoding="utf-8")
    reasons = Counter(re.findall(r'"reason": "([^"]+)"', rejected))
    for reason, number in reasons.most_common():
        console.print(f"left out   {number:>7} {reason}")
    if reasons:
        console.print(f"           each by name: {out / REJECTED}", soft_wrap=True)
    if noted := (out / NOTED).read_bytes().count(b"\n"):
        console.print(f"noted      {noted:>7} by name: {out / NOTED}", soft_wrap=True)
    console.print(str(out), soft_wrap=True)
