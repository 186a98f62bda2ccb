"""Transcripts as files, read back by parsers that are not ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import srt
import webvtt

from mome_dist.speech.views import View
from mome_dist.transcription.results import Segment, Transcript, Transcription, Word, spread_words
from mome_dist.transcription.subtitles import CUE_SECONDS, FORMATS, LINE, cues

TEXTS = ("a first sentence that is much too long for one line of a subtitle of forty two", "das Öl & <b>zwei</b> {3}")


def transcript(*texts: str, path: str = "two words.mp4") -> Transcript:
    segments = []
    for number, text in enumerate(texts):
        said = Transcription(text, (), (), (-0.1,) if text else (), View("asr", 4, None), 9, 5.0, True)
        start, end = 10.0 * number, 10.0 * number + 5
        segments.append(Segment(start, end, said, spread_words(text, start, end), aligned=False))
    return Transcript(Path(path), 20.0, tuple(segments), ("it is a test",))


def test_words_share_a_part_by_their_letters() -> None:
    assert spread_words("ab abcd", 1.0, 9.0) == (Word("ab", 1.0, 4.0), Word("abcd", 4.0, 9.0))
    assert spread_words("  ", 0.0, 1.0) == ()


def test_cues_are_short_and_break_where_nobody_speaks() -> None:
    words = [Word(f"word{number}", number, number + 0.9) for number in range(9)]
    words += [Word("later", 12.0, 12.5), Word("x" * 60, 12.6, 13.0)]
    found = list(cues(words))
    assert " ".join(text.replace("\n", " ") for _, _, text in found).split() == [word.text for word in words]
    assert all(end - start <= CUE_SECONDS and text.count("\n") <= 1 for start, end, text in found)
    assert [round(start, 1) for start, _, _ in found] == [0.0, 7.0, 12.0]
    assert max(len(line) for _, _, text in found[:-1] for line in text.split("\n")) <= LINE
    (_, _, long) = found[-1]
    assert long.split("\n") == ["later", "x" * 60], "a word that is longer than a line has one for itself"


def test_subrip_is_what_another_parser_reads() -> None:
    found = list(srt.parse(FORMATS["srt"](transcript(*TEXTS)), ignore_errors=False))
    assert " ".join(cue.content.replace("\n", " ") for cue in found) == " ".join(TEXTS)
    assert found[0].start.total_seconds() == 0 and found[-1].end.total_seconds() == 15
    assert [cue.index for cue in found] == list(range(1, len(found) + 1))


def test_webvtt_is_what_another_parser_reads(tmp_path: Path) -> None:
    path = tmp_path / "film.vtt"
    path.write_text(FORMATS["vtt"](transcript(*TEXTS)), encoding="utf-8")
    found = webvtt.read(str(path)).captions
    assert " ".join(cue.raw_text.replace("\n", " ") for cue in found[:-1]) == TEXTS[0]
    # A cue's text is markup: what a film says must not become it.
    assert found[-1].raw_text == "das Öl &amp; &lt;b&gt;zwei&lt;/b&gt; {3}"
    assert (found[0].start, found[-1].end) == ("00:00:00.000", "00:00:15.000")


def test_json_and_ctm_have_every_word() -> None:
    given = transcript(*TEXTS)
    record = json.loads(FORMATS["json"](given))
    assert record["file"] == "two words.mp4" and record["notes"] == ["it is a test"] and record["seconds"] == 20
    assert record["text"] == "\n".join(TEXTS)
    assert [segment["text"] for segment in record["segments"]] == list(TEXTS)
    assert record["segments"][1]["words"][0] == {"text": "das", "start": 10.0, "end": 10.8}
    assert [json.loads(line) for line in FORMATS["jsonl"](given).splitlines()] == record["segments"]
    rows = [line.split(" ") for line in FORMATS["ctm"](given).splitlines()]
    assert all(len(row) == 5 and row[:2] == ["two_words", "1"] and float(row[3]) > 0 for row in rows)
    assert [row[4] for row in rows] == " ".join(TEXTS).split()
    assert FORMATS["txt"](given) == f"{TEXTS[0]}\n{TEXTS[1]}\n"


@pytest.mark.parametrize("form", FORMATS)
def test_a_film_in_which_nobody_speaks_is_a_file(form: str, tmp_path: Path) -> None:
    text = FORMATS[form](transcript())
    if form == "vtt":
        (tmp_path / "x.vtt").write_text(text)
        assert not webvtt.read(str(tmp_path / "x.vtt")).captions
    elif form == "json":
        assert json.loads(text)["segments"] == []
    else:
        assert text == ""
