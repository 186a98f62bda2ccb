"""Shards and the reader: webdataset reads them, offsets are true, every damage is named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import decode_flac, encode_flac
from mome_dist.data.shards import MANIFEST, CorpusWriter, EncodedUtterance
from mome_dist.errors import DamagedDataError, UserError


def utterance(name: str, samples: int = 800) -> EncodedUtterance:
    rng = np.random.default_rng(samples)
    audio = rng.normal(0, 0.1, samples).astype(np.float32)
    return EncodedUtterance(name, f"text of {name}", "someone", samples, 0, encode_flac(audio), None, {"n": samples})


def small_corpus(directory: Path, max_utterances: int = 100, max_bytes: int = 1 << 20) -> Path:
    with CorpusWriter(directory, "small", {"a": 1}, None, max_utterances, max_bytes) as writer:
        for number in range(5):
            writer.add("train", utterance(f"t{number}", 800 + number))
        writer.add("test", utterance("x0"))
    return directory


def test_webdataset_reads_the_shards(tiny_corpus_dir: Path, tiny_corpus: Corpus) -> None:
    shards = sorted(str(path) for path in tiny_corpus_dir.glob("train-*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    utterances = tiny_corpus.split("train")
    assert len(samples) == len(utterances) == 24
    for sample, expected in zip(samples, utterances, strict=True):
        assert sample["__key__"] == expected.id
        assert {"flac", "mp4", "txt", "json"} <= sample.keys()
        assert sample["txt"].decode() == expected.text
        assert json.loads(sample["json"]) == tiny_corpus.metadata(expected)
        np.testing.assert_array_equal(decode_flac(sample["flac"], "x"), tiny_corpus.audio(expected))


def test_offsets_are_those_of_tarfile(tiny_corpus_dir: Path, tiny_corpus: Corpus) -> None:
    places = {}
    for path in tiny_corpus_dir.glob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive:
                places[path.name, member.name] = (member.offset_data, member.size)
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
    for split in tiny_corpus.split_names:
        for item in tiny_corpus.split(split):
            for kind, place in item.members.items():
                assert places[item.shard, f"{item.id}.{kind}"] == place


@pytest.fixture(scope="module")
def fixed_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several shards of drawn bytes; half of the ids are not ASCII, some members are absent."""
    directory, drawn = tmp_path_factory.mktemp("fixed") / "corpus", random.Random(0)
    with CorpusWriter(directory, "fixed", {}, None, 3, 20_000) as writer:
        for number in range(8):
            flac, mp4 = (drawn.randbytes(drawn.randrange(9000)) for _ in range(2))
            name = f"{'ü中' * (number % 2)}u{number}"
            video = mp4 if number % 3 else None
            writer.add("train", EncodedUtterance(name, "é", "s", 16, 1, flac, video, {"n": number}))
    return directory


def test_the_bytes_of_a_corpus_stay_what_they_were_without_webdatasets_writer(fixed_corpus: Path) -> None:
    digest, paths = hashlib.sha256(), sorted(path for path in fixed_corpus.iterdir() if path.name != MANIFEST)
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    assert len(paths) == 5
    assert digest.hexdigest() == "cfe68e4400ce2ed8c6ed90912d3cedd2d7f44eff5353ed0541735d3892ddcfd9"


def test_offsets_hold_for_ids_beyond_ascii(fixed_corpus: Path) -> None:
    corpus = Corpus.open(fixed_corpus)
    for item in corpus.split("train"):
        assert corpus.metadata(item) == {"n": int(item.id[-1])}
        for stream in [stream for stream, kind in (("audio", "flac"), ("video", "mp4")) if kind in item.members]:
            corpus.check(item, stream)


def test_an_id_that_a_tar_header_cannot_hold_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="use at most 90 bytes without dots"),
        CorpusWriter(tmp_path / "corpus", "long", {}) as writer,
    ):
        writer.add("train", EncodedUtterance("中" * 40, "", "s", 16, 0, b"x", None))


def test_values_have_the_promised_form(tiny_corpus: Corpus) -> None:
    for item in tiny_corpus.split("test"):
        audio, video = tiny_corpus.audio(item), tiny_corpus.video(item)
        assert audio.dtype == np.float32
        assert audio.shape == (item.samples,)
        assert np.abs(audio).max() <= 1
        assert video.dtype == np.uint8
        assert video.shape == (item.frames, 96, 96)
        assert len(tiny_corpus.metadata(item)["visemes"]) == item.frames
        assert item.frames == -(-item.samples // 640)
        assert hash(item) == hash(Utterance(**{**item.__dict__}))


def test_manifest_says_what_is_there(tiny_corpus_dir: Path, tiny_corpus: Corpus) -> None:
    tiny_corpus.verify()
    for name, entry in tiny_corpus.manifest["splits"].items():
        utterances = tiny_corpus.split(name)
        assert entry["utterances"] == len(utterances) == sum(shard["utterances"] for shard in entry["shards"])
        assert entry["seconds"] == pytest.approx(sum(u.frames for u in utterances) / 25, abs=0.001)
        for shard in entry["shards"]:
            data = (tiny_corpus_dir / shard["file"]).read_bytes()
            assert shard["bytes"] == len(data)
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert tiny_corpus.viseme_names is not None
    assert "sil" in tiny_corpus.viseme_names


@pytest.mark.parametrize(("limits", "shards"), [({}, 1), ({"max_utterances": 2}, 3), ({"max_bytes": 1}, 5)])
def test_shards_split_by_count_and_bytes(tmp_path: Path, limits: dict[str, int], shards: int) -> None:
    corpus = Corpus.open(small_corpus(tmp_path / "c", **limits))
    assert len(corpus.manifest["splits"]["train"]["shards"]) == shards
    assert [u.text for u in corpus.split("train")] == [f"text of t{n}" for n in range(5)]
    assert [len(corpus.audio(u)) for u in reversed(corpus.split("train"))] == [804, 803, 802, 801, 800]


def test_same_content_same_bytes(tmp_path: Path) -> None:
    first, second = small_corpus(tmp_path / "a"), small_corpus(tmp_path / "b")
    for path in first.iterdir():
        if path.name != "manifest.json":
            assert path.read_bytes() == (second / path.name).read_bytes()


def test_nothing_appears_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CorpusWriter(tmp_path / "c", "c", {}) as writer:
        writer.add("train", utterance("a"))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_another_process_published_first_is_kept(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", "late", {}) as writer:
        writer.add("train", utterance("late"))
        small_corpus(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert Corpus.open(tmp_path / "c").manifest["name"] == "small"


def test_a_directory_that_is_no_corpus_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no corpus"):
        small_corpus(tmp_path / "c")
    assert (tmp_path / "c" / "thesis.txt").read_text() == "dear"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["a.b", "", "a/b", "a b", "x" * 91])
def test_bad_ids_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="without dots"), CorpusWriter(tmp_path / "c", "c", {}) as writer:
        writer.add("train", utterance(name))


def test_repeated_ids_and_empty_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="occurs twice"), CorpusWriter(tmp_path / "c", "c", {}) as writer:
        writer.add("train", utterance("a"))
        writer.add("train", utterance("a"))
    with pytest.raises(UserError, match="at least one"), CorpusWriter(tmp_path / "c", "c", {}):
        pass


def test_a_missing_modality_is_named(tmp_path: Path) -> None:
    corpus = Corpus.open(small_corpus(tmp_path / "c"))
    with pytest.raises(UserError, match=r"t0\.mp4: the corpus holds no such member"):
        corpus.video(corpus.split("train")[0])


def test_unknown_split_lists_the_known_ones(tiny_corpus: Corpus) -> None:
    with pytest.raises(UserError, match=r"no split 'dev'; choose one of test, validation, train"):
        tiny_corpus.split("dev")


def _rewrite(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _set_manifest(*keys: str | int, value: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        def change(content: Any) -> None:
            for key in keys[:-1]:
                content = content[key]
            content[keys[-1]] = value

        _rewrite(directory / "manifest.json", change)

    return damage


def _replace_line(number: int, line: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        lines = (directory / "train.jsonl").read_text().splitlines()
        lines[number - 1] = line
        (directory / "train.jsonl").write_text("\n".join(lines) + "\n")

    return damage


def _edit_line(number: int, key: str, value: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        fields = json.loads((directory / "train.jsonl").read_text().splitlines()[number - 1])
        _replace_line(number, json.dumps({**fields, key: value}))(directory)

    return damage


SHARD = ("splits", "train", "shards")
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), r"manifest\.json: no manifest"),
    "manifest is no JSON": (lambda d: (d / "manifest.json").write_text("{"), r"manifest\.json: not JSON"),
    "manifest is a list": (lambda d: (d / "manifest.json").write_text("[]"), "format is None"),
    "unknown version": (_set_manifest("format", value="mome_dist.corpus/9"), "format is 'mome_dist.corpus/9'"),
    "other rate": (_set_manifest("sample_rate", value=8000), "sample_rate is 8000, must be 16000"),
    "no splits": (_set_manifest("splits", value={}), "names no split"),
    "no index named": (_set_manifest("splits", "train", "index", value=None), "'train' names no index file"),
    "no shards": (_set_manifest(*SHARD, value=[]), "'train' has no shards"),
    "shard entry without size": (_set_manifest(*SHARD, 0, "bytes", value=None), "needs file, bytes"),
    "path out of the corpus": (_set_manifest(*SHARD, 0, "file", value="../x.tar"), "must be a plain name"),
    "missing index": (lambda d: (d / "train.jsonl").unlink(), r"train\.jsonl: the index of split 'train' is missing"),
    "empty split": (lambda d: (d / "train.jsonl").write_text(""), r"train\.jsonl: split 'train' is empty"),
    "missing shard": (lambda d: (d / "train-00001.tar").unlink(), r"train-00001\.tar: the shard is missing"),
    "empty shard": (lambda d: (d / "train-00001.tar").write_bytes(b""), r"train-00001\.tar: the shard is empty"),
    "shard cut short": (
        lambda d: os.truncate(d / "train-00001.tar", 5000),
        r"00001\.tar: 5000 bytes, the manifest says",
    ),
    "bad JSON line": (_replace_line(3, "{oops"), r"train\.jsonl:3: not JSON"),
    "line without id": (_replace_line(2, "{}"), r"train\.jsonl:2: bad or missing field"),
    "line is a number": (_replace_line(2, "7"), r"train\.jsonl:2: bad or missing field"),
    "shard not in manifest": (_edit_line(1, "shard", "test-00000.tar"), r"train\.jsonl:1: .*missing from the manifest"),
    "shard not on disk": (_edit_line(4, "shard", "gone.tar"), r"train\.jsonl:4: .*'gone.tar', which does not exist"),
    "offset past the end": (_edit_line(5, "members", {"flac": [10**9, 5]}), r"train\.jsonl:5: .*lies outside"),
    "id twice": (_edit_line(2, "id", "t0"), "id occurs twice"),
    "line lost": (_replace_line(5, ""), r"train\.jsonl:5: not JSON"),
    "count differs": (_set_manifest("splits", "train", "utterances", value=6), "5 utterances, the manifest says 6"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named_at_open(tmp_path: Path, case: str) -> None:
    directory = small_corpus(tmp_path / "c", max_utterances=2)
    Corpus.open(directory)
    damage, message = DAMAGES[case]
    damage(directory)
    with pytest.raises(UserError, match=message):
        Corpus.open(directory)


def test_flipped_bytes_are_found_by_verify_and_by_reading(tmp_path: Path) -> None:
    directory = small_corpus(tmp_path / "c")
    corpus = Corpus.open(directory)
    first = corpus.split("train")[0]
    offset, size = first.members["flac"]
    data = bytearray((directory / first.shard).read_bytes())
    data[offset : offset + size] = b"\xff" * size
    (directory / first.shard).write_bytes(data)
    reopened = Corpus.open(directory)
    with pytest.raises(UserError, match=r"train-00000\.tar: SHA-256 is"):
        reopened.verify()
    with pytest.raises(UserError, match=r"t0\.flac: its bytes have changed"):
        reopened.audio(first)
    assert len(reopened.audio(reopened.split("train")[1])) == 801


def _read_in_child(corpus: Corpus, queue: Any) -> None:
    queue.put([float(np.abs(corpus.audio(u)).sum()) for u in corpus.split("train")])
    corpus.close()


def test_forked_children_and_parent_read_at_the_same_time(tiny_corpus_dir: Path) -> None:
    corpus = Corpus.open(tiny_corpus_dir)
    expected = [float(np.abs(corpus.audio(u)).sum()) for u in corpus.split("train")]  # opens the parent's descriptors
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=_read_in_child, args=(corpus, queue)) for _ in range(2)]
    for child in children:
        child.start()
    for _ in children:
        assert queue.get() == expected
    for child in children:
        child.join()
    assert [float(np.abs(corpus.audio(u)).sum()) for u in corpus.split("train")] == expected


def test_a_pickled_corpus_reads(tmp_path: Path) -> None:
    corpus = Corpus.open(small_corpus(tmp_path / "c"))
    first = corpus.split("train")[0]
    expected = corpus.audio(first)
    copy = pickle.loads(pickle.dumps(corpus))  # of this process, as multiprocessing does it
    np.testing.assert_array_equal(copy.audio(first), expected)
    corpus.close()
    np.testing.assert_array_equal(corpus.audio(first), expected)
    shutil.rmtree(tmp_path / "c")
    corpus.close()
    with pytest.raises(UserError, match="cannot open the shard"):
        corpus.audio(first)


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_of_a_clip_is_found_and_its_neighbours_are_read(tmp_path: Path) -> None:
    directory = small_corpus(tmp_path / "c")
    first, second, *_ = Corpus.open(directory).split("train")
    offset, size = first.members["flac"]
    _flip(directory / first.shard, offset + size - 9)
    corpus = Corpus.open(directory)
    with pytest.raises(DamagedDataError, match=r"train-00000\.tar: t0\.flac: its bytes have changed"):
        corpus.audio(first)
    assert len(corpus.audio(second)) == second.samples


def test_an_index_without_checksums_falls_back_on_the_hash_of_the_shard(tmp_path: Path) -> None:
    directory = small_corpus(tmp_path / "c")
    index = directory / "train.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    index.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "crc32"}) + "\n" for line in lines))
    first, second, *_ = Corpus.open(directory).split("train")
    assert first.crc32 == {} and len(Corpus.open(directory).audio(second)) == second.samples
    _flip(directory / first.shard, first.members["flac"][0])
    with pytest.raises(DamagedDataError, match=r"t1\.flac: the shard has another SHA-256"):
        Corpus.open(directory).audio(second)
