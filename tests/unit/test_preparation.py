"""The parts of a preparation that read no film: texts, trees, lists, cuts, splits, parts of a job array."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mome_dist.data.preparation.clips import SPLITS, TRAIN, VALIDATION, Clip, below, check_clips, hold_out_speakers
from mome_dist.data.preparation.command import Part, part_of
from mome_dist.data.preparation.manifests import read_manifest
from mome_dist.data.preparation.portions import Preparation
from mome_dist.data.preparation.segments import Segment, cut
from mome_dist.data.preparation.settings import PreparationSettings
from mome_dist.data.preparation.text import Word, read_transcript, spell
from mome_dist.data.preparation.trees import LRS3_VALIDATION, lrs2_clips, lrs3_clips
from mome_dist.data.preparation.utterances import Prepared
from mome_dist.data.shards import EncodedUtterance, check_id
from mome_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# As in LRS3's pretrain folder.
PRETRAIN_TEXT = """\
Text:  SO {LG} IT'S WELL-KNOWN <NOISE> THAT
Conf:  3
Ref:   abcDEF

WORD START END ASDSCORE
SO 0.11 0.32 7.1
{LG} 0.4 0.9 2.0
IT'S 1.00 1.20 6.6
WELL-KNOWN 1.20 1.60 5.0
THAT 1.60 1.90 4.0
"""


def put(path: Path, text: str = "Text:  A\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- text ----------------------------------------------------------------------------------------------------------


def test_texts_are_spelled_as_errors_are_counted(tmp_path: Path) -> None:
    transcript = read_transcript(put(tmp_path / "a.txt", PRETRAIN_TEXT))
    assert transcript.text == "so it's well known that"
    assert transcript.words is not None
    assert [word.text for word in transcript.words] == ["so", "", "it's", "well known", "that"]
    assert transcript.words[0] == Word("so", 0.11, 0.32)
    assert read_transcript(put(tmp_path / "b.txt", "Text:  THE `CAT\u2019S'\nConf:  4\n")) == ("the 'cat's'", None)
    assert spell("{LG} <UNK> ...") == ""


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Conf: 4\n", "no line 'Text: ...'"),
        (f"{PRETRAIN_TEXT}WORD 2.0\n", r"a\.txt:11: 'WORD 2.0' is no WORD START END"),
        (f"{PRETRAIN_TEXT}WORD 3.0 2.0 1\n", r"a\.txt:11: .* ends before it starts"),
        (f"{PRETRAIN_TEXT}WORD nan 2.0 1\n", r"a\.txt:11"),
        (f"{PRETRAIN_TEXT}WORD 2.0 inf 1\n", r"a\.txt:11: .* or never"),
    ],
)
def test_wrong_text_files_are_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        read_transcript(put(tmp_path / "a.txt", text))


# --- cuts ----------------------------------------------------------------------------------------------------------


def every_half_second(count: int, start: float = 0.0) -> list[Word]:
    return [Word(f"w{i}", start + i / 2, start + i / 2 + 0.3) for i in range(count)]


def test_cuts_are_in_the_middle_between_words() -> None:
    words = every_half_second(40)  # 20 s at 25 fps
    segments = cut(words, 500, longest=400)
    assert [segment.text.split()[0] for segment in segments] == ["w0", "w32"]
    assert segments[0].start == 0 and segments[1].end == 500
    assert segments[0].end == segments[1].start == round((15.8 + 16.0) / 2 * 25)  # words end at 15.8, start at 16.0
    assert " ".join(segment.text for segment in segments) == " ".join(word.text for word in words)


@pytest.mark.parametrize("longest", [60, 101, 400])
def test_every_word_is_in_exactly_one_segment_and_none_is_too_long(longest: int) -> None:
    words = [*every_half_second(17), *every_half_second(30, 14.0), *every_half_second(9, 33.3)]
    segments = cut(words, 1000, longest)
    assert " ".join(segment.text for segment in segments).split() == [word.text for word in words]
    assert all(0 < segment.end - segment.start <= longest for segment in segments)
    assert all(a.end <= b.start for a, b in pairwise(segments))
    for segment in segments:  # all of a word is where its text is
        inside = [
            word for word in words if segment.start / 25 - 0.021 <= word.start and word.end <= segment.end / 25 + 0.021
        ]
        assert " ".join(word.text for word in inside) == segment.text


def test_long_silence_belongs_to_no_segment() -> None:
    words = [Word("a", 5.0, 5.5), Word("", 9.0, 9.2), Word("b", 20.0, 20.5)]
    assert cut(words, 750, 400) == [Segment(113, 242, "a"), Segment(488, 524, "b")]


def test_words_that_cannot_be_cut_are_named() -> None:
    with pytest.raises(UserError, match="do not ascend"):
        cut([Word("a", 2, 3), Word("b", 1, 2)], 500, 400)
    with pytest.raises(UserError, match=r"'b' starts at 30 s of 20\.00 s"):
        cut([Word("a", 2, 3), Word("b", 30, 31)], 500, 400)
    with pytest.raises(UserError, match=r"'a' takes 1[78]\.\d s"):
        cut([Word("a", 1, 18)], 500, 400)


# --- trees ---------------------------------------------------------------------------------------------------------


def test_an_lrs3_tree(tmp_path: Path) -> None:
    for name in ("pretrain/x/00002", "pretrain/x/00001", "trainval/y/50001", "test/z/00001"):
        put(tmp_path / f"{name}.txt")
    clips = lrs3_clips(tmp_path)
    assert [(clip.name, clip.split, clip.speaker) for clip in clips] == [
        ("pretrain/x/00001", "train", "x"),
        ("pretrain/x/00002", "train", "x"),
        ("trainval/y/50001", "train", "y"),
        ("test/z/00001", "test", "z"),
    ]
    assert clips[0].media == tmp_path / "pretrain/x/00001.mp4" and clips[0].id == "pretrain-x-00001"
    (tmp_path / "test/z/00001.txt").unlink()
    with pytest.raises(UserError, match=r"test holds no SPEAKER/NNNNN\.txt"):
        lrs3_clips(tmp_path)
    with pytest.raises(UserError, match="pretrain is missing"):
        lrs3_clips(tmp_path / "test")


def test_an_lrs2_tree(tmp_path: Path) -> None:
    put(tmp_path / "pretrain.txt", "1/00001\n")
    put(tmp_path / "train.txt", "2/00001\n\n2/00002\n")
    put(tmp_path / "val.txt", "3/00001\n")
    put(tmp_path / "test.txt", "4/00001 NF\n4/00002 MV\n")
    with pytest.raises(UserError, match="pretrain is missing"):
        lrs2_clips(tmp_path)
    for folder in ("pretrain", "main"):
        (tmp_path / "mvlrs_v1" / folder).mkdir(parents=True)
    clips = lrs2_clips(tmp_path)
    assert [clip.split for clip in clips] == ["train"] * 3 + ["validation"] + ["test"] * 2
    assert clips[4].media == tmp_path / "mvlrs_v1/main/4/00001.mp4" and clips[4].speaker == "4"
    put(tmp_path / "val.txt", "../../4/00001\n")
    with pytest.raises(UserError, match=r"val\.txt:1: .* leads out of"):
        lrs2_clips(tmp_path)


# --- lists ---------------------------------------------------------------------------------------------------------


def test_a_list_of_auto_avsr(tmp_path: Path) -> None:
    put(tmp_path / "lrs3/s1/b.wav")
    rows = "lrs3,s1/a.mp4,75,12 7,hello, well, there\n\nlrs3,s1/b.mp4,50,,x\n"
    (first, second), left_out = read_manifest(put(tmp_path / "l.csv", rows), TRAIN, None)
    assert (first.text, first.media, first.audio) == ("hello, well, there", tmp_path / "lrs3/s1/a.mp4", None)
    assert (second.audio, second.speaker) == (tmp_path / "lrs3/s1/b.wav", "s1")
    assert (first.listed_frames, second.listed_frames, first.listed_samples, left_out) == (75, 50, None, [])


def test_lists_need_not_count_frames_and_samples(tmp_path: Path) -> None:
    rows = ",ann/1.mp4,,,hello there\n,bob/1.mp4, , ,x\n"
    clips, left_out = read_manifest(put(tmp_path / "l.csv", rows), TRAIN, None)
    assert [(clip.speaker, clip.listed_frames, clip.text) for clip in clips] == [
        ("ann", None, "hello there"),
        ("bob", None, "x"),
    ]
    put(tmp_path / "l.wrd", "hello\n")
    (clip,), _ = read_manifest(put(tmp_path / "l.tsv", ".\nid\tv.mp4\tv.mp4\t\t\n"), TRAIN, None)
    assert (clip.listed_frames, clip.listed_samples, left_out) == (None, None, [])


def test_the_lists_of_the_tutorial_are_read(tmp_path: Path) -> None:
    page = (ROOT / "docs/tutorials/own-films.md").read_text(encoding="utf-8")
    csv, tsv = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    put(tmp_path / "test.wrd", "hello\n")
    train, _ = read_manifest(put(tmp_path / "train.csv", csv), TRAIN, tmp_path)
    test, _ = read_manifest(put(tmp_path / "test.tsv", tsv), "test", None)
    assert [(clip.speaker, clip.media.relative_to(tmp_path).as_posix()) for clip in train + test] == [
        ("ann", "films/ann/1.mp4"),
        ("bob", "films/bob/1.mp4"),
        ("bob", "films/bob/2.mp4"),
    ]
    assert (test[0].text, test[0].listed_frames, test[0].audio) == ("hello", 83, None)
    check_clips([*train, *test])


def test_a_root_that_is_not_there_is_named_before_any_clip_is_missed(tmp_path: Path) -> None:
    lists = put(tmp_path / "l.csv", ",a.mp4,,,x\n")
    for wrong, why in ((tmp_path / "none", "does not exist"), (lists, "is a file, not a folder")):
        with pytest.raises(UserError, match=rf"--root {re.escape(str(wrong))} {why}; give the folder"):
            read_manifest(lists, TRAIN, wrong)


def test_a_list_of_av_hubert(tmp_path: Path) -> None:
    rows = f"{tmp_path}\ntest/s/1\tvideo/s/1.mp4\taudio/s/1.wav\t75\t48000\n"
    path = put(tmp_path / "lists/test.tsv", rows)
    with pytest.raises(UserError, match=r"test\.wrd is missing"):
        read_manifest(path, "test", None)
    put(tmp_path / "lists/test.wrd", "hello there\n")
    (clip,), _ = read_manifest(path, "test", None)
    assert (clip.name, clip.text, clip.split) == ("test/s/1", "hello there", "test")
    assert (clip.media, clip.audio) == (tmp_path / "video/s/1.mp4", tmp_path / "audio/s/1.wav")
    assert (clip.listed_frames, clip.listed_samples) == (75, 48000)
    put(tmp_path / "lists/test.wrd", "hello\nthere\n")
    with pytest.raises(UserError, match="2 lines for the 1 clips"):
        read_manifest(path, "test", None)


def test_a_root_in_a_list_is_relative_to_the_list(tmp_path: Path) -> None:
    path = put(tmp_path / "lists/l.tsv", "\ufeff../media\r\n1\ta.mp4\ta.mp4\t25\t16000\r\n")
    put(tmp_path / "lists/l.wrd", "\ufeffhello\u2028there\r\n")
    (clip,), _ = read_manifest(path, TRAIN, None)
    assert (clip.media, clip.audio) == (tmp_path / "lists/../media/a.mp4", None)
    assert clip.text is not None and spell(clip.text) == "hello there"


def test_texts_stay_with_their_rows(tmp_path: Path) -> None:
    rows = "".join(f"{name}\t{name}.mp4\t{name}.mp4\t25\t16000\n" for name in "abc")
    put(tmp_path / "l.wrd", "one\n\nthree\n")
    clips, _ = read_manifest(put(tmp_path / "l.tsv", f".\n{rows}"), TRAIN, None)
    assert [(clip.name, clip.text) for clip in clips] == [("a", "one"), ("b", ""), ("c", "three")]


@pytest.mark.parametrize(
    "named",
    ["pipe:cat /etc/passwd", "http://host/a.mp4", "../a.mp4", "a/../../b.mp4", "/etc/a.mp4", "cat a |", "fd:3", "a\0b"],
)
def test_lists_lead_nowhere_else(tmp_path: Path, named: str) -> None:
    with pytest.raises(UserError, match="line 1: "):
        below(tmp_path, named, "line 1")
    put(tmp_path / "l.csv", f",{named},1,,x\n".replace("\0", "/../../"))
    put(tmp_path / "l.tsv", f"{tmp_path}\nid\tv.mp4\t{named}\t1\t1\n".replace("\0", "/../../"))
    put(tmp_path / "l.wrd", "x\n")
    source = {"type": "file", "source": named}
    cut = {"id": "c", "start": 0, "duration": 1, "recording": {"sources": [source]}, "supervisions": [{"text": "x"}]}
    put(tmp_path / "l.jsonl", json.dumps(cut))
    for name in ("l.csv", "l.tsv", "l.jsonl"):
        with pytest.raises(UserError, match=rf"{name}:[12]: "):
            read_manifest(tmp_path / name, TRAIN, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.csv", "lrs3,a.mp4,1\n", r"a\.csv:1: 3 fields, not 5: .*',path,,,text'$"),
        ("a.csv", "\n", "names no clip"),
        ("a.csv", ",a.mp4,1,,x\ndataset,path,frames,tokens,text\n", r"a\.csv:2: 'tokens' where the tokens should be"),
        ("a.csv", ",a,b.mp4,1,1 2,x\n", r"a\.csv:1: 'b\.mp4' where the number of frames should be"),
        ("a.csv", ",a.mp4,1,hello, there\n", r"a\.csv:1: 'hello' where the tokens should be"),
        ("a.csv", ",a.mp4,-1,,x\n", r"a\.csv:1: '-1' where the number of frames should be"),
        ("a.csv", ",a.mp4,1.5,,x\n", r"a\.csv:1: '1\.5' where the number of frames should be"),
        ("a.csv", ",a.mp4,\u0661,,x\n", r"a\.csv:1: '\u0661' where the number of frames should be"),
        ("a.csv", ',"a.mp4",1,,x\n', r"a\.csv:1: a quoted path"),
        ("a.csv", ',a.mp4,1,,"x\ny"\n', r"a\.csv:1: .* quoted text of several lines"),
        ("a.tsv", "", "its first line must be the root folder"),
        ("a.tsv", "id\tv.mp4\tv.mp4\t1\t1\n", "its first line must be the root folder"),
        ("a.tsv", "/\nid\tv.mp4\n", r"a\.tsv:2: 2 fields, not 5"),
        ("a.tsv", ".\nid\tv.mp4\tv.mp4\t1\t1\t\n", r"a\.tsv:2: 6 fields, not 5"),
        ("a.tsv", ".\nid\tv.mp4\tv.mp4\tall\t1\n", r"a\.tsv:2: 'all' where the number of frames should be"),
        ("a.tsv", ".\nid\tv.mp4\tv.mp4\t1\t1e4\n", r"a\.tsv:2: '1e4' where the number of samples should be"),
        ("a.parquet", "", r"lists end in \.csv, \.tsv, \.jsonl, \.jsonl\.gz; see docs/how-to/prepare\.md$"),
    ],
)
def test_wrong_lists_are_named(tmp_path: Path, name: str, text: str, named: str) -> None:
    put(tmp_path / "a.wrd", "x\n")
    with pytest.raises(UserError, match=named):
        read_manifest(put(tmp_path / name, text), TRAIN, None)
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path / "absent.csv", TRAIN, None)


# --- clips and splits ----------------------------------------------------------------------------------------------


def clip(name: str, split: str = TRAIN) -> Clip:
    return Clip(name, split, name.split("/")[1], Path("/data") / f"{name}.mp4", text="x")


def test_ids_are_those_that_shards_can_hold() -> None:
    assert clip("a/b/c").id == "a-b-c"
    names = ["a/b.c", "a/b c", "a/b/c", "a/\u00e4", "a/" + "x" * 100, "a/" + "x" * 99 + "y"]
    ids = [Clip(name, TRAIN, "s", Path(name)).id for name in names]
    assert len(set(ids)) == len(names)
    for identity in ids:
        check_id(f"{identity}-000")


def test_no_two_names_have_one_id() -> None:
    """Nor has a segment of one the id of another."""
    known = ["pretrain/0Fi83BHQsMA/00001", "trainval/x_y/50001", "main/5535415699068794046/00001", "c1"]
    assert [Clip(name, TRAIN, "s", Path(name)).id for name in known] == [name.replace("/", "-") for name in known]
    rng = random.Random(0)
    names = {"a/b-c", "a-b/c", "a-b-c", "a/b/c", "a", "a/000", "a-000", "a--000", "", "-", "--", "a//b"}
    names |= {"".join(rng.choice("ab1/--._ \u00e4") for _ in range(rng.randint(1, 8))) for _ in range(3000)}
    names |= {f"{name}{end}" for name in rng.sample(sorted(names), 500) for end in ("/000", "-001", "/1000", "x" * 90)}
    names |= {Clip(name, TRAIN, "s", Path(name)).id for name in names}  # what looks like an id already
    taken: set[str] = set()
    for name in names:
        identity = Clip(name, TRAIN, "s", Path(name)).id
        check_id(f"{identity}-1000")
        segments = {identity, *(f"{identity}-{number:03d}" for number in (0, 1, 1000))}
        assert not segments & taken, name
        taken |= segments


def test_names_that_are_no_text_are_refused() -> None:
    with pytest.raises(UserError, match=r"clip 'a/\\udce9/1': the name of a file or folder is not UTF-8"):
        check_clips([clip("a/\udce9/1")])


def test_a_clip_twice_is_refused() -> None:
    with pytest.raises(UserError, match="'a/b/1' occurs twice"):
        check_clips([clip("a/b/1"), clip("a/b/2"), clip("a/b/1")])


def test_a_test_clip_is_unseen_however_its_path_is_written(tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to("/data")
    for media in ("/data/lists/../a/b/1.mp4", f"{tmp_path}/linked/a/b/1.mp4"):
        with pytest.raises(UserError, match="a test must be unseen"):
            check_clips([clip("a/b/1"), replace(clip("a/b/2", "test"), media=Path(media))])


def test_whole_speakers_are_held_out_until_the_share_is_reached() -> None:
    clips = [clip(f"{kind}/s{i % 20}/{i}") for kind in ("pretrain", "trainval") for i in range(100)]
    clips += [clip(f"test/t{i}/{i}", "test") for i in range(9)]
    kept, left_out = hold_out_speakers(clips, 0.12, LRS3_VALIDATION)
    speakers = {split: {c.speaker for c in kept if c.split == split} for split in SPLITS}
    assert len(speakers[VALIDATION]) == 3  # 5 clips each: 12 of 100 need three
    assert not speakers[VALIDATION] & speakers[TRAIN] and not speakers[VALIDATION] & speakers["test"]
    assert all(c.name.startswith("trainval/") for c in kept if c.split == VALIDATION)
    assert {c.speaker for c in left_out} == speakers[VALIDATION]
    assert len(kept) + len(left_out) == len(clips)
    again, _ = hold_out_speakers(clips[::-1], 0.12, LRS3_VALIDATION)
    assert {c for c in again if c.split == VALIDATION} == {c for c in kept if c.split == VALIDATION}
    with pytest.raises(UserError, match="1 speaker"):
        hold_out_speakers([clip("trainval/a/1")], 0.1, LRS3_VALIDATION)


# --- parts ---------------------------------------------------------------------------------------------------------


def test_parts_of_a_job_array() -> None:
    assert part_of(None, {}) == Part(0, 1)
    assert part_of("2/8", {"SLURM_ARRAY_TASK_ID": "5"}) == Part(1, 8)
    array = {
        "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_STEP": "2",
        "SLURM_ARRAY_TASK_COUNT": "4",
    }
    assert part_of(None, array) == Part(3, 4)
    with pytest.raises(UserError, match="without gaps"):
        part_of(None, {**array, "SLURM_ARRAY_TASK_ID": "9"})
    for wrong in ("0/4", "5/4", "1", "a/b"):
        with pytest.raises(UserError, match=f"--part {wrong}"):
            part_of(wrong, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [("validation_share", 1.0), ("longest_seconds", 0), ("longest_gap", -1), ("clips_per_shard", 0), ("limit", 0)],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        PreparationSettings("lrs3", **{name: value})  # type: ignore[arg-type]


# --- two at once ---------------------------------------------------------------------------------------------------


class Preparer:
    """Makes one utterance of each clip without reading it; before the ``pause``-th clip something else happens."""

    def __init__(self, pause: int = 0, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.left, self.meanwhile = pause, meanwhile

    def prepare(self, clip: Clip) -> Prepared:
        if self.left == 1:
            self.meanwhile()
        self.left -= 1
        return Prepared([EncodedUtterance(clip.id, "X", clip.speaker, 640, 1, b"sound", None)], frames=1)


class Watch:
    def starts(self, clip: Clip) -> None:
        pass

    def ends(self, frames: int) -> None:
        pass


def prepare_all(out: Path, preparer: Any) -> Preparation:
    settings = PreparationSettings("lrs3", clips_per_shard=2)
    preparation = Preparation(out, settings, [clip(f"a/s/{number}") for number in range(6)])
    preparation.begin()
    for portion in preparation.missing():
        preparation.do(portion, preparer, Watch())
    assert preparation.finish()
    return preparation


@pytest.mark.parametrize("pause", [1, 2, 3, 6])
def test_two_preparations_at_once_both_end_well(tmp_path: Path, pause: int) -> None:
    """The second is done, and has cleared away its working folder, while the first is in the middle of a portion."""
    alone = prepare_all(tmp_path / "alone/out", Preparer())
    out = tmp_path / "both/out"
    prepare_all(out, Preparer(pause, lambda: (prepare_all(out, Preparer()), None)[1]))
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    for path in alone.out.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_many_that_finish_at_once_publish_one_corpus(tmp_path: Path) -> None:
    settings = PreparationSettings("lrs3", clips_per_shard=2)
    preparation = Preparation(tmp_path / "out", settings, [clip(f"a/s/{number}") for number in range(6)])
    preparation.begin()
    preparer: Any = Preparer()
    for portion in preparation.portions:
        preparation.do(portion, preparer, Watch())
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if preparation.finish() else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert preparation.is_done()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [path.name for path in preparation.out.iterdir() if path.name.startswith(".")]


def test_of_two_with_other_clips_the_second_is_refused(tmp_path: Path) -> None:
    settings = PreparationSettings("lrs3")
    Preparation(tmp_path / "out", settings, [clip("a/s/1")]).begin()
    with pytest.raises(UserError, match="begun with other clips or settings"):
        Preparation(tmp_path / "out", settings, [clip("a/s/2")]).begin()
