"""`mome-dist prepare` on real faces and real speech: trees and lists become corpora, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import jiwer
import numpy as np
import pytest
import webdataset
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from mome_dist.assets import asset_dir
from mome_dist.commands.prepare import main
from mome_dist.data.corpus import Corpus
from mome_dist.data.media import encode_flac, encode_video
from mome_dist.data.preparation import utterances
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.speech.geometry import AVHUBERT
from mome_dist.text import normalize
from tests.face_films import TEXTS, crop_mouth, face_video, speech, write_clip, write_lrs2, write_lrs3

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def lrs3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lrs3(tmp_path_factory.mktemp("data") / "lrs3")


@pytest.fixture(scope="module")
def prepared(lrs3: Path) -> Path:
    """The corpus of that tree, made by one uninterrupted process."""
    out = lrs3.parent / "corpus"
    assert main(["lrs3", str(lrs3), str(out), "--workers", "1", "--clips-per-shard", "1"]) == 0
    return out


def contents(directory: Path) -> dict[str, str]:
    """Hash by name of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_an_lrs3_tree_becomes_a_corpus(prepared: Path) -> None:
    corpus = Corpus.open(prepared)
    corpus.verify()
    assert corpus.manifest["geometry"] == corpus.geometry == AVHUBERT
    found = {name: [(u.id, u.speaker) for u in corpus.split(name)] for name in corpus.split_names}
    assert found == {
        "train": [
            ("pretrain-speaker0-00001-000", "speaker0"),
            ("pretrain-speaker0-00001-001", "speaker0"),
            ("trainval-speaker2-50001", "speaker2"),
            ("trainval-speaker3-50001", "speaker3"),
        ],
        "validation": [("trainval-speaker1-50001", "speaker1")],
        "test": [("test-speaker4-00001", "speaker4")],
    }
    first, second = corpus.split("train")[:2]
    assert first.text == f"{TEXTS['0870']} {TEXTS['0920']}" and second.text == TEXTS["0890"]
    assert first.samples == first.frames * 640 and 15 * 25 < first.frames <= 16 * 25
    assert corpus.metadata(second) == {"clip": "pretrain/speaker0/00001", "start_frame": 17 * 25 - 8}
    assert not prepared.with_name("corpus.preparing").exists()


def test_mouths_and_sound_are_those_of_the_film(prepared: Path) -> None:
    corpus = Corpus.open(prepared)
    (utterance,) = corpus.split("test")
    video, audio = corpus.video(utterance), corpus.audio(utterance)
    film = face_video(len(video))
    expected = crop_mouth(film, FaceMesh().track(film))
    assert video.shape == expected.shape == (83, 96, 96)
    assert np.abs(video.astype(int) - expected).mean() < 4  # compressed twice on the way
    original = speech("0930")[: len(audio)]
    assert np.corrcoef(audio[: len(original)], original)[0, 1] > 0.98
    # Sound and picture of the second segment are still in step with the first one's.
    second = corpus.split("train")[1]
    start = corpus.metadata(second)["start_frame"] / 25
    late = round((7.1 + 2 + 6.05 + 2 - start) * 16_000)
    assert np.corrcoef(corpus.audio(second)[late : late + 60_000], speech("0890")[:60_000])[0, 1] > 0.98


def test_webdataset_reads_the_shards(prepared: Path) -> None:
    shards = sorted(str(path) for path in prepared.glob("train-*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [u.id for u in Corpus.open(prepared).split("train")]
    assert all({"mp4", "flac", "txt", "json"} <= sample.keys() for sample in samples)


def test_whisper_reads_the_prepared_speech(prepared: Path) -> None:
    """All five recordings, one of them cut out of a long clip, decoded by the pretrained model's own decoder."""
    corpus = Corpus.open(prepared)
    chosen = [u for name in ("train", "test") for u in corpus.split(name) if u.id != "trainval-speaker3-50001"]
    assert sorted(" ".join(u.text for u in chosen).split()) == sorted(" ".join(TEXTS.values()).split())
    directory = asset_dir("whisper-tiny.en")
    model = WhisperForConditionalGeneration.from_pretrained(directory, local_files_only=True).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(directory, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    clips = [corpus.audio(utterance) for utterance in chosen]
    features = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    texts = tokenizer.batch_decode(model.generate(features), skip_special_tokens=True)
    wer = 100 * jiwer.wer([utterance.text for utterance in chosen], [normalize(text) for text in texts])
    print(f"WER of the prepared speech: {wer:.2f} %")
    assert wer <= 6


def test_an_lrs2_tree_becomes_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["lrs2", str(write_lrs2(tmp_path / "lrs2")), str(tmp_path / "corpus"), "--workers", "1"]
    assert main([*command, "--longest-seconds", "5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    assert {name: [u.id for u in corpus.split(name)] for name in corpus.split_names} == {
        "train": ["pretrain-100-00001-000", "pretrain-100-00001-001", "main-101-00001"],
        "validation": ["main-102-00001"],
        "test": ["main-103-00001"],
    }
    assert [u.text for u in corpus.split("train")[:2]] == [TEXTS["0880"], TEXTS["0930"]]
    assert main([*command, "--longest-seconds", "5"]) == 0 and "reused" in capsys.readouterr().out
    assert main(command) == 2
    assert "holds a corpus of other clips or settings" in capsys.readouterr().err


def test_lists_of_films_and_of_crops_become_a_corpus(tmp_path: Path) -> None:
    """A film with sound in a list of auto_avsr; crops beside their sound in one of av_hubert; a part of a film."""
    write_clip(tmp_path / "films/ann/1", "", speech("0880"))
    write_clip(tmp_path / "films/bob/1", "", speech("0930"))
    crops = np.stack([image[20:116, 40:136] for image in face_video(75)])
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops/1.mp4").write_bytes(encode_video(crops))
    (tmp_path / "crops/1.flac").write_bytes(encode_flac(speech("0880")))
    (tmp_path / "train.csv").write_text("films,ann/1.mp4,75,,Well, he was not\nfilms,bob/1.mp4,83,,so much\n")
    (tmp_path / "valid.tsv").write_text(f"{tmp_path}\nc.1\tcrops/1.mp4\tcrops/1.flac\t75\t47840\n")
    (tmp_path / "valid.wrd").write_text("he was not an ill disposed young man\n")
    cut = {
        "id": "cut-7",
        "start": 1.0,
        "duration": 1.52,
        "recording": {"sources": [{"type": "file", "source": "films/bob/1.mp4"}]},
        "supervisions": [{"text": "been made amiable", "speaker": "bob"}],
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(cut))
    lists = ["--train", "train.csv", "--validation", "valid.tsv", "--test", "test.jsonl"]
    paths = [word if word.startswith("--") else str(tmp_path / word) for word in lists]
    out = tmp_path / "corpus"
    command = ["manifests", str(out), "--workers", "1", "--root", str(tmp_path)]
    assert main([*command, *paths]) == 2, "a film of the test split is also in the training split"
    (tmp_path / "train.csv").write_text("films,ann/1.mp4,75,,Well, he was not\n")
    assert main([*command, *paths]) == 0
    corpus = Corpus.open(out)
    (train,), (valid,), (test,) = (corpus.split(name) for name in ("train", "validation", "test"))
    assert (train.id, train.speaker, train.text) == ("films-ann-1", "ann", "well he was not")
    assert np.abs(corpus.video(valid).astype(int) - crops).mean() < 4, "crops are taken as they are"
    assert test.id.startswith("cut-7--") and (test.frames, test.samples) == (38, 38 * 640)
    expected = speech("0930")[16_000 : 16_000 + test.samples]
    assert np.corrcoef(corpus.audio(test), expected)[0, 1] > 0.98


# --- what cannot be used -------------------------------------------------------------------------------------------


def test_every_clip_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, text, audio = tmp_path / "lrs3", TEXTS["0880"], speech("0880")
    wall = np.full((75, 64, 80), 90, np.uint8)
    lost = face_video(75).copy()
    lost[10:40] = 90
    still = np.zeros((17 * 25, 96, 96), np.uint8)
    bad = root / "trainval/bad"
    write_clip(root / "test/one/good", text, audio)
    write_clip(root / "trainval/good/1", text, audio)
    write_clip(root / "trainval/alone/1", text, audio)
    write_clip(bad / "wall", text, audio, wall)
    write_clip(bad / "lost", text, audio, lost)
    write_clip(bad / "empty", "{LG} <SIGH>", audio, wall)
    write_clip(bad / "longer", text, np.tile(audio, 2), wall)
    write_clip(bad / "long", text, np.zeros(17 * 16_000, np.float32), still)
    write_clip(root / "pretrain/bad/times", text, np.zeros(17 * 16_000, np.float32), still)
    with (root / "pretrain/bad/times.txt").open("a") as file:
        file.write("\nWORD START END ASDSCORE\nHE 3.0 4.0 1\nWAS 2.0 2.5 1\n")
    write_clip(bad / "cut", text, audio, wall)
    (bad / "cut.mp4").write_bytes((bad / "cut.mp4").read_bytes()[:9000])
    write_clip(bad / "gone", text, audio, wall)
    (bad / "gone.mp4").unlink()
    write_clip(bad / "deaf", text, audio, wall)
    (bad / "deaf.mp4").write_bytes(encode_video(wall))
    write_clip(bad / "blind", text, audio, wall)
    (bad / "blind.mp4").write_bytes(encode_flac(audio))
    (bad / "other.txt").write_bytes(b"Text:\xff\xfe")
    out = tmp_path / "corpus"
    assert main(["lrs3", str(root), str(out), "--workers", "2", "--validation-share", "0"]) == 0
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    found = {entry["name"].split("/")[-1]: (entry["reason"], entry["detail"]) for entry in rejected}
    assert found.keys() == {
        *("wall", "lost", "empty", "longer", "long", "times", "cut", "gone", "deaf", "blind", "other")
    }
    expected = {
        "wall": (utterances.NO_FACE, "no face in 75 of 75 frames, 75 of them in a row"),
        "lost": (utterances.NO_FACE, "no face in 30 of 75 frames, 30 of them in a row (at most 25 are bridged)"),
        "empty": (utterances.NO_TEXT, "empty.txt: its text is empty"),
        "longer": (utterances.LENGTHS, "longer.mp4: 6.0"),
        "long": (utterances.TOO_LONG, "17.0 s, at most 16.0 s; the times of its words are not known"),
        "times": (utterances.BAD_TIMES, "times.txt: the times of the words do not ascend"),
        "cut": (utterances.UNREADABLE, "cut.mp4: cannot be read as audio or video"),
        "gone": (utterances.UNREADABLE, "gone.mp4 does not exist"),
        "deaf": (utterances.NO_AUDIO, "deaf.mp4 has no audio stream"),
        "blind": (utterances.NO_VIDEO, "blind.mp4 has no video stream"),
        "other": (utterances.NO_TEXT, "other.txt:1: column 6: byte 0xff is not UTF-8"),
    }
    for name, (reason, detail) in expected.items():
        assert found[name][0] == reason and detail in found[name][1], (name, found[name])
    corpus = Corpus.open(out)
    assert [u.id for u in corpus.split("train")] == ["trainval-alone-1", "trainval-good-1"]
    assert corpus.split_names == ["train", "test"], "no validation split was asked for"
    assert "left out 2 no face" in " ".join(capsys.readouterr().out.split())


def test_a_split_without_any_usable_clip_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wall = np.full((50, 64, 64), 90, np.uint8)
    for name in ("pretrain/a/1", "trainval/b/1", "trainval/c/1", "test/d/1"):
        write_clip(tmp_path / "lrs3" / name, "a", np.zeros(32_000, np.float32), wall)
    assert main(["lrs3", str(tmp_path / "lrs3"), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "no clip of the train split could be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mistakes_are_found_before_any_work(
    lrs3: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    cases = (
        (["lrs3", str(tmp_path / "absent"), str(tmp_path / "o")], "absent does not exist"),
        (["lrs3", str(lrs3), str(tmp_path / "o"), "--workers", "0"], "--workers 0"),
        (["lrs3", str(lrs3), str(tmp_path / "o"), "--part", "3/2"], "--part 3/2"),
        (["lrs3", str(lrs3), str(tmp_path / "o"), "--limit", "0"], "--limit 0"),
        (["lrs3", str(lrs3), str(tmp_path / "taken")], "holds no corpus"),
        (["lrs3", str(lrs3), str(prepared), "--limit", "1"], "other clips or settings"),
        (["manifests", str(tmp_path / "o")], "no list is given"),
    )
    for arguments, named in cases:
        assert main(arguments) == 2
        assert named in capsys.readouterr().err
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.preparing").exists()


# --- interruptions and parts ---------------------------------------------------------------------------------------


def command(lrs3: Path, out: Path, *more: str) -> list[str]:
    return ["lrs3", str(lrs3), str(out), "--clips-per-shard", "1", *more]


def test_kill_9_anywhere_and_again_gives_the_same_bytes(lrs3: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    words = [sys.executable, str(ROOT / "tools/prepare_lrs.py"), *command(lrs3, out, "--workers", "2")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    records = tmp_path / "corpus.preparing/portions"
    for wanted in (0, 2):  # at the very start, and in the middle
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
        while len(list(records.glob("*.json"))) < wanted or not records.exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    left = {path.name for path in (tmp_path / "corpus.preparing/corpus").iterdir()}
    assert main(command(lrs3, out, "--workers", "1")) == 0
    assert left and contents(out) == contents(prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_parts_share_the_work_and_the_last_one_joins(
    lrs3: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "corpus"
    assert main(command(lrs3, out, "--workers", "1", "--part", "2/3")) == 0
    assert "3 portions are left to other parts" in capsys.readouterr().out
    assert main(command(lrs3, out, "--merge")) == 2
    assert "3 portions are not done yet, train-00000 first" in capsys.readouterr().err
    assert main(command(lrs3, out, "--limit", "1")) == 2
    assert "begun with other clips or settings" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")  # the number of parts may change on the way
    for task in (1, 0):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert not out.exists()
        assert main(command(lrs3, out, "--workers", "1")) == 0
    assert contents(out) == contents(prepared)


def test_a_dead_worker_is_told_with_its_clip(lrs3: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    words = [sys.executable, str(ROOT / "tools/prepare_lrs.py"), *command(lrs3, out, "--workers", "2")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    long_clip = "pretrain/speaker0/00001"
    killed = None
    while killed is None:
        assert process.poll() is None, "it ended before its worker could be killed"
        for path in tmp_path.glob("mome-prepare-*/*"):
            with suppress(FileNotFoundError):
                if path.read_text().startswith(long_clip):
                    killed = int(path.name)
                    os.kill(killed, signal.SIGKILL)
        time.sleep(0.01)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"a worker process was killed, perhaps for want of memory, at {long_clip} (" in told
    assert "speaker2" not in told and "speaker3" not in told, "the other worker's clip is not to blame"
    assert (tmp_path / "corpus.preparing").is_dir() and not out.exists()
