"""Logits from Hugging Face in one process and from Megatron-Core in a world: of an LLM alone, and of a trained run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import AutoModelForCausalLM

from mome_dist.config import load_config
from mome_dist.config.derived import views_of
from mome_dist.data.corpus import Corpus
from mome_dist.llm.megatron import FrozenLLM, build_frozen_llm
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.weights import load_weights
from mome_dist.model.distributed import Chunk, MicroBatch
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.preflight import validate
from mome_dist.training.run_directory import owned_run
from mome_dist.training.setup import prepare, rank_console
from tests.packed import pack_rows, unpack_rows
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
        ids_N, context = pack_rows(ids_BS)

        def forward_step(_iterator: Any, model: FrozenLLM) -> tuple[torch.Tensor, Any]:
            embedded = model.embed(ids_N) if model.pre_process else None
            output = model.logits(embedded, context)
            return output, lambda logits: (torch.zeros(()), unpack_rows(logits, ids_BS).numpy())

        results = _through_the_schedule(forward_step, [llm], [None], context.tokens)
        return results[0] if parallel_state.is_pipeline_last_stage() else None


def trained_logits(overrides: list[str], world: int, cache: Path) -> list[tuple[int, np.ndarray]]:
    """Logits at the label positions of the validation split, from the newest checkpoint of a run, at the run's layout.

    Args:
        overrides: of the run (`Lab.overrides`), its layout included.
        cache: of features.

    Returns:
        (data-parallel rank, fp32 [L, V]) of each data-parallel rank: its share of every view, one after the other.
    """
    parts = [part for part in run_world(_trained, world, overrides, cache) if part is not None]
    shares: dict[int, list[np.ndarray]] = {}
    for data_rank, _, logits in sorted(parts, key=lambda part: part[:2]):
        shares.setdefault(data_rank, []).append(logits)
    return [(data_rank, np.concatenate(columns, axis=-1)) for data_rank, columns in shares.items()]


def _trained(overrides: list[str], cache: Path) -> tuple[int, int, np.ndarray] | None:
    """(data-parallel rank, tensor-parallel rank, logits [L, V / tp]) on the last stage."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    config = load_config(overrides)
    layout = validate(config, int(os.environ["WORLD_SIZE"]))
    with parallel_world(layout, config.seed, timeout_seconds=120) as at, owned_run(config) as ownership:
        trainer = prepare(config, layout, at, ownership, rank_console())
        assert trainer.start == config.training.steps, "the trained weights, not the initial ones"
        model = trainer.model.eval()
        validation = len(Corpus.open(config.data.corpus).split(config.data.validation_split))
        step = trainer.batches["validation"].build(range(validation), views_of(config))

        def forward_step(batches: Any, stage: Chunk) -> tuple[torch.Tensor, Any]:
            batch: MicroBatch = next(batches)
            embedded = stage.embed(batch) if stage.llm.pre_process else None
            output = stage.llm.logits(embedded, batch.tokens.context)
            return output, lambda logits: (torch.zeros(()), logits[batch.tokens.labels.index_L].numpy())

        tokens = step.microbatches[0].tokens.context.tokens
        results = _through_the_schedule(forward_step, model.parts(), step.microbatches, tokens)
        if not parallel_state.is_pipeline_last_stage():
            return None
        return at.dp, parallel_state.get_tensor_model_parallel_rank(), np.concatenate(results)


@torch.no_grad()
def _through_the_schedule(
    forward_step: Callable[..., Any], parts: Sequence[torch.nn.Module], batches: Sequence[Any], tokens: int
) -> list[np.ndarray]:
    """What the last stage collects of every batch; ``tokens`` is the size of one of them."""
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=list(parts),
        num_microbatches=len(batches),
        seq_length=tokens,
        micro_batch_size=1,
        forward_only=True,
    )
