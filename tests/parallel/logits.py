"""Logits of a directory's model from Hugging Face in one process and from Megatron-Core in a world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import AutoModelForCausalLM

from mome_dist.llm.megatron import FrozenLLM, build_frozen_llm
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.weights import load_weights
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from tests.parallel.worlds import run_world


def hugging_face_logits(directory: Path, ids_BS: np.ndarray) -> np.ndarray:
    """fp32 [B, S, V], in a process of its own."""
    return run_world(_hugging_face, 1, directory, ids_BS)[0]


def megatron_logits(directory: Path, ids_BS: np.ndarray, tp: int, pp: int, kernel: str = "eager") -> np.ndarray:
    """fp32 [B, S, V], from the parts of a world of tp x pp processes."""
    parts = run_world(_megatron, tp * pp, directory, ids_BS, tp, pp, kernel)
    return np.concatenate([part for part in parts if part is not None], axis=-1)


def _hugging_face(directory: Path, ids_BS: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids_BS)).logits.numpy()


def _megatron(directory: Path, ids: np.ndarray, tp: int, pp: int, kernel: str) -> np.ndarray | None:
    """Logits [B, S, V / tp] on the last stage, computed through the pipeline schedule."""
    layout = Layout.for_world(tp * pp, tp=tp, pp=pp)
    with parallel_world(layout, 0, timeout_seconds=120):
        shape = LLMShape.from_directory(directory)
        llm = build_frozen_llm(shape, torch.float32, kernel, torch.device("cpu"), layout).eval()
        load_weights(llm, shape, directory)
        ids_BS = torch.from_numpy(ids)
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
