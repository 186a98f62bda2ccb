"""What a line is, and what is no text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mome_dist.data.corpus import Corpus
from mome_dist.data.preparation.text import read_transcript
from mome_dist.errors import UserError
from mome_dist.evaluation.comparison import read_texts
from mome_dist.text_files import lines_of, parse_json, read_json, split_lines
from mome_dist.training.metrics import keep_until
from mome_dist.training_log import TrainingLog

NO_ENDS = "a\u2028b\u2029c\x85d\ve\ff\x1cg\x1dh\x1ei"
"""Text that has every character that `str.splitlines` takes for a line end and editors do not."""


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_lines_end_as_in_an_editor(tmp_path: Path) -> None:
    text = f"one\ntwo\r\nthree\r\r\n{NO_ENDS}\n\nend"
    expected = ["one", "two", "three", "", NO_ENDS, "", "end"]
    for more in ("", "\n"):
        for mark in (b"", b"\xef\xbb\xbf"):
            assert list(lines_of(put(tmp_path / "a.txt", mark + (text + more).encode()))) == expected
            packed = gzip.compress(mark + (text + more).encode())
            assert list(lines_of(put(tmp_path / "a.jsonl.gz", packed))) == expected
        assert split_lines(text + more) == expected
    assert list(lines_of(put(tmp_path / "a.txt", b""))) == split_lines("") == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"good\r\ncaf\xe9\n", r"a\.txt:2: column 4: byte 0xe9 is not UTF-8"),
        (b"a\rb\nc\n" + b"x" * 100_000 + b"\n\xed\xa0\x80\n", r"a\.txt:5: column 1: byte 0xed is not UTF-8"),
        (b"cut \xe2\x80", r"a\.txt:1: column 5: byte 0xe2 is not UTF-8"),
        ("hello\n".encode("utf-16"), r"a\.txt:1: column 1: UTF-16, or no text"),
        ("hello\n".encode("utf-16-be"), r"a\.txt:1: column 1: UTF-16, or no text"),
        ("hello\n".encode("utf-16-le"), r"a\.txt:1: column 2: UTF-16, or no text"),
        (b"one\ntw\0o\n", r"a\.txt:2: column 3: UTF-16, or no text"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(tmp_path: Path, content: bytes, named: str) -> None:
    with pytest.raises(UserError, match=named):
        list(lines_of(put(tmp_path / "a.txt", content)))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"one\n" * 100_000)
    for path, named in (
        (tmp_path / "absent.txt", r"absent\.txt: cannot be read \(No such file"),
        (tmp_path, r"cannot be read \(Is a directory"),
        (put(tmp_path / "plain.gz", b"one\n"), r"plain\.gz: cannot be read \(Not a gzipped file"),
        (put(tmp_path / "torn.gz", whole[:-20]), r"torn\.gz: cannot be read after line \d+ \(Compressed file ended"),
        (put(tmp_path / "bad.gz", whole[:60] + b"\xff" * 9 + whole[69:]), r"bad\.gz: cannot be read after line"),
        (put(tmp_path / "bomb.gz", gzip.compress(bytes(1 << 25).replace(b"\0", b" "))), r"bomb\.gz:1: a line of more"),
    ):
        with pytest.raises(UserError, match=named):
            list(lines_of(path))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "here: key 'c' occurs twice"),
        ('{"a": ', "here is not JSON"),
        ("[" * 100_000, "here is not JSON"),
        ('["\\ud83d"]', "here is not JSON .*surrogates"),
    ],
)
def test_json_is_read_whole_or_refused(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_json(text, "here")
    assert parse_json('["\\ud83d\\ude00", null]', "here") == ["\U0001f600", None]


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    assert read_json(put(tmp_path / "a.json", b'\xef\xbb\xbf{\r\n"train_batch_size": 1}\r\n')) == {
        "train_batch_size": 1
    }


def test_texts_of_lrs_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "\ufeffText:  HELLO\u2028THERE\r\nConf:  4\r\n".encode())
    assert read_transcript(path).text == "hello there"
    with pytest.raises(UserError, match=r"a\.txt:2: column 5: byte 0xff"):
        read_transcript(put(path, b"Text: A\nRef:\xff\n"))
    with pytest.raises(UserError, match=r"a\.txt:2: a second 'Text: \.\.\.'"):
        read_transcript(put(path, b"Text: A\nText: B\n"))


def test_records_hold_any_text(tmp_path: Path) -> None:
    """Records of an evaluation, whose texts are not escaped, and of a run's log."""
    record = {"view": "asr(4)", "condition": "clean", "id": "a", "reference": "x", "hypothesis": NO_ENDS}
    put(tmp_path / "hypotheses.jsonl", f"{json.dumps(record, ensure_ascii=False)}\n".encode())
    assert read_texts(tmp_path) == {("asr(4)", "clean"): {"a": ("x", NO_ENDS)}}
    log = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": 1.0, "skipped": [NO_ENDS]} for step in (1, 2)]
    put(log, "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in records).encode() + b'{"step": 3, "l\xff')
    assert TrainingLog.read(log).steps == records
    keep_until(log, 1)
    assert json.loads(log.read_text(encoding="utf-8")) == records[0]


def test_an_index_that_is_no_text_is_named(tiny_corpus_dir: Path, tmp_path: Path) -> None:
    for path in tiny_corpus_dir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    index = (tmp_path / "train.jsonl").read_bytes()
    (tmp_path / "train.jsonl").unlink()
    put(tmp_path / "train.jsonl", index.replace(b'"text"', b'"t\xffxt"'))
    with pytest.raises(UserError, match=r"train\.jsonl:1: column \d+: byte 0xff is not UTF-8"):
        Corpus.open(tmp_path).split("train")
