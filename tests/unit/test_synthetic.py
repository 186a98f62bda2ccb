"""The generator: one corpus for one seed, disjoint splits, lips that agree with the sound."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import cv2
import numpy as np
import pytest

from mome_dist.config.speech_backends import installed_backends, resolve_backend
from mome_dist.data.corpus import Corpus
from mome_dist.data.films import Film
from mome_dist.data.synthetic import SyntheticSettings, default_corpus_dir, generate_corpus
from mome_dist.data.synthetic.grammar import SLOTS, VOCABULARY, draw_sentences
from mome_dist.data.synthetic.render import render
from mome_dist.data.synthetic.speakers import Voice, draw_speaker
from mome_dist.data.synthetic.speech import synthesise, synthesiser
from mome_dist.data.synthetic.visemes import TARGETS, VISEME_NAMES, Segment, blend, frame_labels
from mome_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_grammar_is_large_and_unambiguous() -> None:
    assert len(SLOTS) >= 7
    assert len(set(VOCABULARY)) == len(VOCABULARY) >= 40
    sentences = draw_sentences(600, seed=3)
    assert len(set(sentences)) == 600
    assert draw_sentences(100, seed=3) == sentences[:100]
    assert draw_sentences(100, seed=4) != sentences[:100]
    for slot, words in zip(SLOTS, zip(*(s.split() for s in sentences), strict=True), strict=True):
        counts = Counter(words)
        assert counts.keys() == set(slot)
        assert max(counts.values()) - min(counts.values()) <= 0.1 * min(counts.values()) + 2  # balanced
    with pytest.raises(UserError, match="at most"):
        draw_sentences(10**7, seed=0)


def test_splits_share_neither_sentences_nor_speakers(tiny_corpus: Corpus) -> None:
    texts = {name: {u.text for u in tiny_corpus.split(name)} for name in tiny_corpus.split_names}
    speakers = {name: {u.speaker for u in tiny_corpus.split(name)} for name in tiny_corpus.split_names}
    assert set(texts) == {"train", "validation", "test"}
    assert [len(texts[name]) for name in ("train", "validation", "test")] == [24, 4, 4]
    assert [len(speakers[name]) for name in ("train", "validation", "test")] == [8, 4, 4]
    assert len(set().union(*texts.values())) == 32
    assert len(set().union(*speakers.values())) == 16
    faces = {draw_speaker(s, i, ("v",), 0).face for s in ("train", "validation", "test") for i in range(12)}
    assert len(faces) == 36


def test_default_sizes() -> None:
    settings = SyntheticSettings()
    assert (settings.train, settings.validation, settings.test, settings.seed) == (1600, 80, 72, 0)
    assert (settings.train_speakers, settings.validation_speakers, settings.test_speakers) == (48, 8, 12)


def test_two_workers_make_the_same_bytes_as_one(tmp_path: Path) -> None:
    settings = SyntheticSettings(train=3, validation=1, test=2, test_speakers=1, seed=1)
    one = generate_corpus(settings, tmp_path / "one", workers=1)
    two = generate_corpus(settings, tmp_path / "two", workers=2)
    files = sorted(path.name for path in one.iterdir() if path.is_file())
    assert files == sorted(path.name for path in two.iterdir() if path.is_file())
    for name in files:
        if name != "manifest.json":  # it holds the directory's name
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_existing_corpus_is_reused_and_never_overwritten(
    tiny_corpus_dir: Path, tiny_settings: SyntheticSettings
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_corpus_dir.rglob("*")}
    assert generate_corpus(tiny_settings, tiny_corpus_dir) == tiny_corpus_dir
    with pytest.raises(UserError, match="holds a corpus of other settings"):
        generate_corpus(replace(tiny_settings, seed=8), tiny_corpus_dir)
    assert before == {path: path.stat().st_mtime_ns for path in tiny_corpus_dir.rglob("*")}


def test_default_directory_follows_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOME_DIST_CACHE", str(tmp_path))
    directory = default_corpus_dir(SyntheticSettings())
    assert directory.parent == tmp_path / "corpora"
    assert len(directory.name) == len("synthetic-") + 8
    assert default_corpus_dir(SyntheticSettings(backend=resolve_backend("auto"))) == directory
    assert default_corpus_dir(SyntheticSettings(seed=1)) != directory


def test_contact_sheets_and_samples(tiny_corpus_dir: Path, tiny_corpus: Corpus) -> None:
    for name in ("contact_sheet.png", "visemes.png"):
        sheet = cv2.imread(str(tiny_corpus_dir / name), cv2.IMREAD_GRAYSCALE)
        assert sheet is not None
        assert sheet.shape[0] % 96 == sheet.shape[1] % 96 == 0
    samples = sorted((tiny_corpus_dir / "samples").glob("*.mp4"))
    assert [path.stem for path in samples] == [u.id for u in tiny_corpus.split("test")[:3]]
    for path, utterance in zip(samples, tiny_corpus.split("test"), strict=False):
        film = Film(path)
        assert film.video().shape == (utterance.frames, 96, 96)
        assert len(film.audio()) >= utterance.samples
        assert path.with_suffix(".txt").read_text().strip() == utterance.text


@pytest.mark.parametrize("backend", installed_backends())
def test_backends_agree_with_their_own_timing(backend: str) -> None:
    """Where a backend is loud its segments must be speech, and pauses must be quiet."""
    for name in synthesiser(backend).voices:
        voice = Voice(name, pitch=1.05, stretch=0.9, warp=1.05)
        speech = synthesise(backend, "carry purple feather", voice)
        again = synthesise(backend, "carry purple feather", voice)
        np.testing.assert_array_equal(speech.audio, again.audio)
        assert speech.audio.dtype == np.float32
        assert 0.7 < len(speech.audio) / 16_000 < 3
        assert speech.segments[-1].end == pytest.approx(len(speech.audio) / 16_000, abs=0.15)
        assert all(a.end == pytest.approx(b.start) for a, b in zip(speech.segments, speech.segments[1:], strict=False))
        assert {segment.viseme for segment in speech.segments} <= set(VISEME_NAMES)
        names = [segment.viseme for segment in speech.segments if segment.viseme != "sil"]
        assert names[0] == "KGN"
        assert names.count("PBM") == 2
        assert names.count("FV") == names.count("TH") == 1
        loud = np.abs(speech.audio) > 0.3 * np.abs(speech.audio).max()
        times = np.flatnonzero(loud) / 16_000
        spoken = [segment for segment in speech.segments if segment.viseme != "sil"]
        assert times.min() >= spoken[0].start - 0.03
        assert times.max() <= spoken[-1].end + 0.03


def fundamental(audio: np.ndarray) -> float:
    """Median pitch in Hz, from the autocorrelation of loud stretches of 64 ms."""
    found = []
    for part in audio[: len(audio) // 1024 * 1024].reshape(-1, 1024):
        if np.std(part) > 0.5 * np.std(audio):
            correlation = np.correlate(part, part, "full")[1023:]
            found.append(16_000 / (45 + correlation[45:230].argmax()))  # 70 to 355 Hz
    return float(np.median(found))


@pytest.mark.parametrize("backend", installed_backends())
def test_tempo_pitch_and_warp_reach_the_sound(backend: str) -> None:
    name = synthesiser(backend).voices[0]
    plain, slow, high, warped = (
        synthesise(backend, "orange river alone", Voice(name, *settings)).audio
        for settings in ((0.85, 0.8, 1.0), (0.85, 1.2, 1.0), (1.2, 0.8, 1.0), (0.85, 0.8, 1.1))
    )
    assert len(slow) > 1.3 * len(plain)
    assert fundamental(high) > 1.08 * fundamental(plain)
    assert len(warped) == pytest.approx(len(plain) / 1.1, abs=2)
    assert fundamental(warped) == pytest.approx(1.1 * fundamental(plain), rel=0.05)


def test_backend_errors_name_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="choose auto, flite or espeak"):
        resolve_backend("festival")
    monkeypatch.setenv("PATH", os.devnull)  # no flite
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    assert resolve_backend("auto") == "espeak"
    with pytest.raises(UserError, match="apt-get install flite"):
        resolve_backend("flite")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no speech synthesiser found; install flite .* or install espeak-ng"):
        resolve_backend("auto")


def test_blend_reaches_dominant_targets_and_stays_in_bounds() -> None:
    segments = [Segment(0.0, 0.2, "AA"), Segment(0.2, 0.3, "PBM"), Segment(0.3, 0.5, "AA")]
    track = blend(segments, 13)
    jaw, seal = track[:, 0], track[:, 5]
    assert seal.argmax() == pytest.approx((0.25 - 0.04) * 25 - 0.5, abs=0.6)  # lips lead the sound by 40 ms
    assert seal.max() > 0.8
    assert jaw[int(seal.argmax())] < 0.3 < 0.7 < jaw.max()
    values = np.array(list(TARGETS.values()))[:, :-1]
    assert (track >= values.min(0) - 1e-6).all()
    assert (track <= values.max(0) + 1e-6).all()


def test_frame_labels_are_the_segment_at_mid_frame() -> None:
    labels = frame_labels([Segment(0.05, 0.10, "PBM"), Segment(0.10, 0.16, "AA")], 6)
    assert [VISEME_NAMES[label] for label in labels] == ["sil", "PBM", "AA", "AA", "sil", "sil"]


def test_visemes_look_different() -> None:
    """Poses of one face differ from each other, all drawn with the same camera noise; an open mouth is dark inside."""
    face = draw_speaker("train", 0, ("v",), 0).face
    poses = {}
    for name, target in TARGETS.items():
        poses[name] = render(np.array([target[:-1]], np.float32), face, np.random.default_rng(0))[0].astype(float)
    groups = ["PBM", "FV", "SZ", "SHCHJ", "AA", "IY", "UW", "OW", "EH", "TH"]
    for i, first in enumerate(groups):
        for second in groups[i + 1 :]:
            assert np.abs(poses[first] - poses[second])[30:75, 15:80].mean() > 1.0, (first, second)
    dark = {name: (poses[name][35:60, 30:66] < 40).sum() for name in ("AA", "PBM")}
    assert dark["AA"] > 3 * dark["PBM"] + 50


def test_render_depends_on_rng_and_face_alone() -> None:
    track = blend([Segment(0, 0.4, "AA")], 10)
    first, second = (draw_speaker("train", i, ("v",), 0).face for i in range(2))
    video = render(track, first, np.random.default_rng(5))
    assert video.shape == (10, 96, 96)
    assert video.dtype == np.uint8
    np.testing.assert_array_equal(video, render(track, first, np.random.default_rng(5)))
    assert np.abs(video.astype(int) - render(track, first, np.random.default_rng(6))).mean() > 1
    assert np.abs(video.astype(int) - render(track, second, np.random.default_rng(5))).mean() > 5


def test_settings_errors() -> None:
    with pytest.raises(UserError, match="train: 0 utterances"):
        SyntheticSettings(train=0)
    with pytest.raises(UserError, match="test: 72 utterances of 0 speakers"):
        SyntheticSettings(test_speakers=0)


def test_bad_workers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers is 0"):
        generate_corpus(SyntheticSettings(train=1), tmp_path / "c", workers=0)


def test_command_line_makes_then_reuses(tmp_path: Path) -> None:
    """The command as the README gives it, in processes of its own."""
    command = [sys.executable, str(ROOT / "tools" / "make_corpus.py"), "--train=2", "--validation=1", "--test=1"]
    command += ["--workers=1", f"--out={tmp_path / 'c'}"]
    made, reused = (
        subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT) for _ in range(2)
    )
    assert (made.returncode, reused.returncode) == (0, 0), made.stderr + reused.stderr
    assert made.stdout.splitlines()[-1] == reused.stdout.splitlines()[-1] == str(tmp_path / "c")
    assert "made in" in made.stdout
    assert "reused" in reused.stdout
    wrong = subprocess.run([*command, "--seed=5"], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert len(wrong.stderr.splitlines()) == 1
