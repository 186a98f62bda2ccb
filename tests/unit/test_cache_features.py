"""The command that encodes a corpus once: what it writes, what it says, and that it goes on where it stopped."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from mome_dist.commands.features import main
from mome_dist.config import load_config
from mome_dist.config.schema import RunConfig
from mome_dist.data.corpus import Corpus
from mome_dist.data.features import FeatureStore
from mome_dist.parallel.plain_world import World
from mome_dist.training.caching import cache_features
from tests.encoder_directories import encoder_directories


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small Whisper and a small AV-HuBERT."""
    folder = tmp_path_factory.mktemp("encoders")
    return ["audio_encoder.padding=clip", "video_encoder=avhubert_base", *encoder_directories(folder, layers=1)]


@pytest.fixture
def config(encoders: list[str], tiny_corpus_dir: Path, tmp_path: Path) -> RunConfig:
    return load_config([*encoders, f"data.corpus={tiny_corpus_dir}", f"data.features_dir={tmp_path / 'features'}"])


def test_every_split_and_stream_is_encoded_once(config: RunConfig, tiny_corpus: Corpus) -> None:
    said = io.StringIO()
    first = cache_features(config, None, World(), Console(file=said, width=120))
    assert [(each.stream, each.split) for each in first] == [
        (stream, split) for stream in ("audio", "video") for split in ("train", "validation")
    ]
    for each in first:
        utterances = tiny_corpus.split(each.split)
        seconds = sum(u.samples / 16_000 if each.stream == "audio" else u.frames / 25 for u in utterances)
        assert each.encoded == each.utterances == len(utterances) == len(FeatureStore(each.directory))
        assert each.speech_seconds == pytest.approx(seconds)
        assert each.speed == pytest.approx(seconds / each.seconds)
        assert each.bytes == sum(path.stat().st_size for path in Path(each.directory).glob("part-*"))
        assert {path.stat().st_mode & 0o777 for path in Path(each.directory).glob("part-*")} == {0o644}, "shared"
        assert each.directory in said.getvalue()
    assert "(100 %)" in said.getvalue(), "progress"
    again = cache_features(config, ["train", "test"], World(), Console(quiet=True))
    encoded = {(each.stream, each.split): each.encoded for each in again}
    assert encoded["audio", "train"] == encoded["video", "train"] == 0 < encoded["audio", "test"]
    assert again[0].speed is None


def test_features_of_a_video_are_one_a_frame(config: RunConfig, tiny_corpus: Corpus) -> None:
    config.task.tasks = ["vsr"]  # lips alone: no audio is encoded
    (train, _) = cache_features(config, None, World(), Console(quiet=True))
    store = FeatureStore(train.directory)
    assert all(store.get(u.id).shape == (u.frames, 32) for u in tiny_corpus.split("train"))


def test_the_command_line(
    encoders: list[str], tiny_corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"data.corpus={tiny_corpus_dir}", "--output", str(tmp_path), "--split", "test", *encoders]
    assert main(arguments) == 0
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} >= {"test"}
    capsys.readouterr()
    for wrong, message in (
        ("--split=tests", "tests"),
        ("video_encoder.path=/nowhere", "mome-dist convert avhubert"),
        ("data.corpus=/nowhere", "does not exist"),
        ("audio_encoder.padding=long", "audio_encoder.padding"),
    ):
        assert main([*arguments, wrong]) == 2
        assert message in capsys.readouterr().err
