"""The frozen LLM under Megatron-Core gives Hugging Face's logits, at every division, from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import AutoTokenizer, LlamaForCausalLM

from mome_dist.assets import asset_dir
from mome_dist.llm.megatron import FrozenLLM, build_frozen_llm
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.weights import load_weights
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from tests.parallel import toy
from tests.parallel.worlds import run_world

TEXT = [
    "The north wind and the sun were disputing which was the stronger, when a traveller came along wrapped in a cloak.",
    "Speech is the fastest way in which people exchange what they know.",
]


def _ids(directory: Path) -> np.ndarray:
    """Real text where the directory has a tokenizer, random ids where it has none: int64 [B, S]."""
    if not (directory / "tokenizer.json").is_file():
        return np.random.default_rng(0).integers(0, LLMShape.from_directory(directory).vocabulary, size=(2, 20))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [tokenizer(text).input_ids for text in TEXT]
    shortest = min(map(len, rows))
    return np.array([row[:shortest] for row in rows])


def _hugging_face(directory: Path) -> np.ndarray:
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(_ids(directory))).logits.numpy()


def _megatron(directory: Path, tp: int, pp: int, kernel: str) -> np.ndarray | None:
    """Logits [B, S, V / tp] on the last stage, computed through the pipeline schedule."""
    with parallel_world(Layout.for_world(tp * pp, tp=tp, pp=pp, ep=1), 0, timeout_seconds=120):
        shape = LLMShape.from_directory(directory)
        llm = build_frozen_llm(shape, torch.float32, kernel, torch.device("cpu")).eval()
        load_weights(llm, shape, directory)
        ids_BS = torch.from_numpy(_ids(directory))
        padding_BS = torch.zeros_like(ids_BS, dtype=torch.bool)

        def forward_step(_iterator: Any, model: FrozenLLM) -> tuple[torch.Tensor, Any]:
            embedded = model.embed(ids_BS) if model.pre_process else None
            output = model.logits(embedded, padding_BS)
            return output, lambda logits: (torch.zeros(()), logits.transpose(0, 1).numpy())

        with torch.no_grad():
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([None]),
                model=[llm],
                num_microbatches=1,
                seq_length=ids_BS.shape[1],
                micro_batch_size=ids_BS.shape[0],
                forward_only=True,
            )
            return results[0] if parallel_state.is_pipeline_last_stage() else None


def _compare(directory: Path, tp: int, pp: int, kernel: str, tolerance: float) -> None:
    expected = run_world(_hugging_face, 1, directory)[0]
    parts = [part for part in run_world(_megatron, tp * pp, directory, tp, pp, kernel) if part is not None]
    np.testing.assert_allclose(np.concatenate(parts, axis=-1), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_smollm2_logits_equal_hugging_face(tp: int, pp: int) -> None:
    # Nine heads in three groups: two tensor-parallel ranks need a padded fourth group.
    _compare(asset_dir("smollm2-135m"), tp, pp, "eager", 1e-4)


@pytest.mark.parametrize(("tp", "pp", "kernel"), [(2, 2, "eager"), (2, 1, "sdpa"), (4, 1, "eager"), (1, 4, "sdpa")])
def test_random_llama_logits_equal_hugging_face(tmp_path: Path, tp: int, pp: int, kernel: str) -> None:
    # Eight heads in two groups: four tensor-parallel ranks pad two groups.
    _compare(toy.write_llama(tmp_path, heads=8, kv_heads=2), tp, pp, kernel, 1e-5)


def test_untied_and_tied_output_layers(tmp_path: Path) -> None:
    _compare(toy.write_llama(tmp_path / "tied", tied=True), 2, 1, "eager", 1e-5)
