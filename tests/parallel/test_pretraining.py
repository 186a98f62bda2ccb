"""Pre-training on several processes is pre-training on one: same gradients, same statistics, one artefact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mome_dist import pretrain_llm, pretrain_video
from mome_dist.artefact import read_record
from mome_dist.data.corpus import Utterance
from mome_dist.data.media import encode_video
from mome_dist.data.shards import CorpusWriter, EncodedUtterance
from mome_dist.llm.tiny import tiny_llama, word_tokenizer
from mome_dist.parallel.plain_world import open_world
from mome_dist.speech.video_encoder import VideoEncoder, VideoEncoderConfig
from mome_dist.training import copy_pretraining
from mome_dist.training.copy_pretraining import CopySettings, CopyTask, CopyTrainer
from mome_dist.training.viseme_pretraining import VisemeSettings, VisemeTrainer
from tests.parallel.worlds import run_world

CLASSES = 3
SMALL = VideoEncoderConfig(trunk_widths=(4, 8), width=16, heads=2, ffn_width=32, position_kernel=5)
SETTINGS = VisemeSettings(steps=2, batch_size=8, group_size=2, window_frames=6, calibration_clips=11)
UTTERANCES = [Utterance(f"u{i}", "s.tar", "words", "speaker", 640, 3 + i % 7, {}) for i in range(12)]
TEXTS = ["fetch golden basket", "carry pink rope", "wash brown wheel", "lift a silver ladder"]


def clip(utterance: Utterance) -> tuple[Tensor, Tensor]:
    """A clip whose mean brightness tells its visemes."""
    draw = np.random.default_rng(int(utterance.id[1:]))
    visemes = draw.integers(CLASSES, size=utterance.frames)
    frames = draw.integers(0, 60, (utterance.frames, 96, 96)) + 80 * visemes[:, None, None]
    return torch.from_numpy(frames.astype(np.uint8)), torch.from_numpy(visemes)


def flat(tensors: Any) -> NDArray[np.float32]:
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors]).numpy()


def viseme_run() -> dict[str, Any]:
    with open_world() as world:
        trainer = VisemeTrainer(clip, CLASSES, UTTERANCES, SETTINGS, world, SMALL)
        loss, _ = trainer.gradients(0)
        gradient = flat(parameter.grad for parameter in trainer.parameters)
        trainer.calibrate()
        buffers = flat(trainer.encoder.buffers())
        return {"loss": loss, "gradient": gradient, "buffers": buffers, "accuracy": trainer.accuracy(UTTERANCES)}


def products(fast: str) -> set[str]:
    """Types of the products of a pre-training step where ``fast`` is the device's fast precision."""
    copy_pretraining.fast_precision = lambda: fast  # in a forked process of its own
    with open_world() as world:
        tokenizer = word_tokenizer(TEXTS)
        model = tiny_llama(tokenizer, hidden=32, layers=1, heads=2, kv_heads=1, ffn_width=64)
        trainer = CopyTrainer(model, CopyTask(tokenizer, TEXTS), CopySettings(steps=1, batch_size=2), world)
        seen: set[str] = set()
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *call: seen.add(str(call[2].dtype)))
        trainer.gradients(0)
        return seen


@pytest.mark.parametrize(("fast", "dtype"), [("fp32", "torch.float32"), ("bf16", "torch.bfloat16")])
def test_the_llm_is_pretrained_in_what_the_device_multiplies_fast(fast: str, dtype: str) -> None:
    assert run_world(products, 1, fast) == [{dtype}]


def copy_run() -> dict[str, Any]:
    with open_world() as world:
        tokenizer = word_tokenizer(TEXTS)
        model = tiny_llama(tokenizer, hidden=32, layers=2, heads=2, kv_heads=1, ffn_width=64)
        task = CopyTask(tokenizer, TEXTS)
        trainer = CopyTrainer(model, task, CopySettings(steps=1, batch_size=6), world)
        loss, _ = trainer.gradients(0)
        gradient = flat(parameter.grad for parameter in trainer.parameters)
        return {"loss": loss, "gradient": gradient, "accuracy": trainer.accuracy(task, rows=10)}


@pytest.mark.parametrize("world", [2, 3])  # 3 does not divide the four groups
def test_viseme_gradients_and_statistics_do_not_depend_on_the_world(world: int) -> None:
    (alone,) = run_world(viseme_run, 1)
    assert np.abs(alone["gradient"]).max() > 1e-3
    for rank in run_world(viseme_run, world):
        assert rank["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert rank["accuracy"] == pytest.approx(alone["accuracy"], abs=1e-9)
        np.testing.assert_allclose(rank["gradient"], alone["gradient"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(rank["buffers"], alone["buffers"], rtol=1e-4, atol=1e-5)


def test_calibrated_features_have_zero_mean_and_unit_variance() -> None:
    with open_world() as world:
        trainer = VisemeTrainer(clip, CLASSES, UTTERANCES, SETTINGS, world, SMALL)
        trainer.settings = VisemeSettings(batch_size=8, group_size=4, calibration_clips=len(UTTERANCES))
        trainer.calibrate()
        trainer.encoder.eval()
        with torch.no_grad():
            features = torch.cat(trainer.encoder([clip(utterance)[0] for utterance in UTTERANCES]))
    torch.testing.assert_close(features.mean(0), torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(features.std(0, correction=0), torch.ones(16), rtol=0, atol=1e-3)


@pytest.mark.parametrize("world", [2, 3])
def test_llm_gradients_do_not_depend_on_the_world(world: int) -> None:
    """Rows pad differently and run in bfloat16, hence the tolerance; a lost rank would be half the gradient."""
    (alone,) = run_world(copy_run, 1)
    for rank in run_world(copy_run, world):
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        error = np.linalg.norm(rank["gradient"] - alone["gradient"]) / np.linalg.norm(alone["gradient"])
        assert error < 0.02


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "corpus"
    with CorpusWriter(directory, "toy", {}, ["closed", "half", "open"], geometry="toy mouths") as writer:
        for split, ids in (("train", range(12)), ("validation", range(20, 24))):
            for i in ids:
                frames, visemes = clip(Utterance(f"u{i}", "", "", "", 0, 5, {}))
                metadata = {"visemes": visemes.tolist()}
                text = TEXTS[i % len(TEXTS)]
                writer.add(
                    split,
                    EncodedUtterance(
                        f"u{i}", text, f"{split}{i}", 3200, 5, None, encode_video(frames.numpy()), metadata
                    ),
                )
    return directory


def video_command(corpus: Path, out: Path) -> int:
    return pretrain_video.main(
        ["--corpus", str(corpus), "--out", str(out), "--steps", "2", "--batch-size", "4", "--group-size", "2"]
    )


def llm_command(corpus: Path, out: Path) -> int:
    return pretrain_llm.main(["--corpus", str(corpus), "--out", str(out), "--steps", "2", "--batch-size", "4"])


def test_video_command_publishes_once_and_then_skips(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    assert run_world(video_command, 2, corpus, out) == [0, 0]
    encoder = VideoEncoder.from_pretrained(out)
    assert json.loads((out / "config.json").read_text())["geometry"] == "toy mouths"  # it expects what it learnt from
    record = read_record(out)
    assert record is not None and 0.0 <= record["results"]["accuracy"] <= 1.0
    assert encoder.feature_std.min() > 0
    first = (out / "model.safetensors").stat()
    assert run_world(video_command, 2, corpus, out) == [0, 0]
    assert (out / "model.safetensors").stat().st_ino == first.st_ino  # the same file: nothing was made anew
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "encoder"]


def test_llm_command_publishes_a_directory(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "llm"
    assert run_world(llm_command, 2, corpus, out) == [0, 0]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (out / "tokenizer.json").is_file()
    first = (out / "model.safetensors").stat()
    assert run_world(llm_command, 1, corpus, out) == [0]
    assert (out / "model.safetensors").stat().st_ino == first.st_ino


def test_corpus_without_visemes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "corpus"
    with CorpusWriter(directory, "toy", {}) as writer:
        video = encode_video(clip(UTTERANCES[0])[0].numpy())
        writer.add("train", EncodedUtterance("a", "hello", "s", 3200, UTTERANCES[0].frames, None, video))
    assert video_command(directory, tmp_path / "encoder") == 2
    assert "has no visemes" in capsys.readouterr().err
    assert not (tmp_path / "encoder").exists()
