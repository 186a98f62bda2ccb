"""The frozen LLM under Megatron-Core gives Hugging Face's logits, at every division, from the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mome_dist.assets import asset_dir
from mome_dist.llm.shape import LLMShape
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.verification.probe import write_random_llama
from tests import tiny_llms
from tests.parallel import toy
from tests.parallel.logits import hugging_face_logits, megatron_logits
from tests.parallel.worlds import run_world

TEXT = [
    "The north wind and the sun were disputing which was the stronger, when a traveller came along wrapped in a cloak.",
    "Speech is the fastest way in which people exchange what they know.",
]


def _text_ids(directory: Path) -> np.ndarray:
    """Token ids of real text, int64 [B, S]."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [tokenizer(text).input_ids for text in TEXT]
    shortest = min(map(len, rows))
    return np.array([row[:shortest] for row in rows])


def _random_ids(directory: Path, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, LLMShape.from_directory(directory).vocabulary, size=(2, length))


def _compare(directory: Path, ids: np.ndarray, tp: int, pp: int, kernel: str, tolerance: float) -> None:
    expected = hugging_face_logits(directory, ids)
    found = megatron_logits(directory, ids, tp, pp, kernel)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_smollm2_logits_equal_hugging_face(tp: int, pp: int) -> None:
    # Nine heads in three groups: two tensor-parallel ranks need a padded fourth group.
    directory = asset_dir("smollm2-135m")
    _compare(directory, _text_ids(directory), tp, pp, "eager", 1e-4)


@pytest.mark.parametrize(("tp", "pp", "kernel"), [(2, 2, "eager"), (2, 1, "sdpa"), (4, 1, "eager"), (1, 4, "sdpa")])
def test_random_llama_logits_equal_hugging_face(tmp_path: Path, tp: int, pp: int, kernel: str) -> None:
    # Eight heads in two groups: four tensor-parallel ranks pad two groups.
    directory = write_random_llama(tmp_path, heads=8, kv_heads=2)
    _compare(directory, _random_ids(directory, 20), tp, pp, kernel, 1e-5)


def test_untied_and_tied_output_layers(tmp_path: Path) -> None:
    directory = write_random_llama(tmp_path / "tied", tied=True)
    _compare(directory, _random_ids(directory, 20), 2, 1, "eager", 1e-5)


# Sequences are longer than the original context of `tiny_llms.LLAMA3_ROPE`. Six heads in three groups: two ranks pad a
# fourth group.
LENGTH = 64
THREE_GROUPS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama3": lambda path: tiny_llms.save(tiny_llms.llama3(), path),
    "llama3 in three groups": lambda path: tiny_llms.save(tiny_llms.llama3(**THREE_GROUPS), path),
    "qwen2": lambda path: tiny_llms.save(tiny_llms.qwen2(), path, shard_size="20KB"),
    "qwen2 in three groups": lambda path: tiny_llms.save(tiny_llms.qwen2(**THREE_GROUPS), path),
    "qwen2 tied": lambda path: tiny_llms.save(tiny_llms.qwen2(tie_word_embeddings=True), path),
    "qwen2 with llama3 scaling": lambda path: tiny_llms.save(
        tiny_llms.qwen2(rope_parameters=dict(tiny_llms.LLAMA3_ROPE)), path
    ),
}
Directories = Callable[[str], tuple[Path, np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """A model's directory, token ids, and Hugging Face's logits for them; each made once."""
    made: dict[str, tuple[Path, np.ndarray, np.ndarray]] = {}

    def make(name: str) -> tuple[Path, np.ndarray, np.ndarray]:
        if name not in made:
            directory = MODELS[name](tmp_path_factory.mktemp("llm"))
            ids = _random_ids(directory, LENGTH)
            made[name] = directory, ids, hugging_face_logits(directory, ids)
        return made[name]

    return make


WORLDS = [(1, 1), (2, 1), (1, 2), (2, 2)]
CASES = [(name, *world) for name in ("llama3", "qwen2") for world in WORLDS]
CASES += [("llama3 in three groups", 2, 1), ("qwen2 in three groups", 2, 1), ("qwen2", 4, 1)]
CASES += [("qwen2 tied", 2, 2), ("qwen2 with llama3 scaling", 2, 1)]


@pytest.mark.parametrize(("name", "tp", "pp"), CASES)
def test_every_architecture_equals_hugging_face(directories: Directories, name: str, tp: int, pp: int) -> None:
    directory, ids, expected = directories(name)
    np.testing.assert_allclose(megatron_logits(directory, ids, tp, pp), expected, rtol=0, atol=1e-5)


def test_scaling_and_biases_matter_in_these_models(directories: Directories, tmp_path: Path) -> None:
    """Otherwise the test above could not fail: dropping either moves the logits far beyond its tolerance."""
    for name, plain in (
        ("llama3", tiny_llms.llama3(rope_parameters={"rope_type": "default", "rope_theta": 1000.0})),
        ("qwen2", tiny_llms.qwen2()),
    ):
        with torch.no_grad():
            for parameter_name, parameter in plain.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.zero_()
        _, ids, expected = directories(name)
        without = hugging_face_logits(tiny_llms.save(plain, tmp_path / name), ids)
        assert np.abs(without - expected).max() > 0.1


def _reference_losses(directory: Path) -> list[float]:
    model = toy.reference(directory, "mhsa")
    batches = [toy.microbatch([0, 1, 2], [view]) for view in toy.VIEWS]
    return [model.loss(batch.tokens, batch.features).item() for batch in batches]


def _distributed_losses(directory: Path) -> list[float]:
    layout = Layout.for_world(2, tp=2)
    with parallel_world(layout, toy.SEED, timeout_seconds=60):
        model = toy.distributed(directory, "mhsa", layout)
        chunk = model.chunks[0]
        return chunk(toy.microbatch([0, 1, 2])).tolist()


def test_qwen2_reads_speech_in_both_forms(directories: Directories) -> None:
    directory, _, _ = directories("qwen2")
    expected = run_world(_reference_losses, 1, directory)[0]
    for found in run_world(_distributed_losses, 2, directory):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
