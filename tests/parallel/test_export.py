"""What was trained under Megatron-Core is what an export gives a plain Hugging Face model: the same logits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mome_dist.export.adapter import export_adapter
from mome_dist.inference.load import LoadedRun, load_run
from tests.parallel.logits import trained_logits
from tests.parallel.runs import Lab, validation_step
from tests.parallel.worlds import run_world

STEPS = 4


def _label_logits(run: LoadedRun, dp_rank: int, dp_size: int) -> np.ndarray:
    """As `trained_logits` of that data-parallel rank, from transformers' model in this process."""
    with torch.no_grad():
        return np.concatenate(
            [
                run.model.label_logits(batch.tokens, batch.features).numpy()
                for batch in validation_step(run, dp_rank, dp_size).microbatches
            ]
        )


def _export_and_compare(run: Path, target: Path, cache: Path, dp_size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Logits of the export for every data-parallel rank, and of the model before training for the first."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    export_adapter(run, target)
    untrained = load_run(run, weights=False)
    shutil.rmtree(run)
    adapter = load_run(target)
    return [_label_logits(adapter, rank, dp_size) for rank in range(dp_size)], _label_logits(untrained, 0, dp_size)


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "more"),
    [(2, 2, 1, ["mome=mhsa"]), (2, 1, 2, ["mome=ffn", "mome.bias_rate=0.01", "mome.score=sigmoid"])],
)
def test_an_export_has_the_logits_of_the_distributed_model(
    lab: Lab, tmp_path: Path, tp: int, pp: int, ep: int, more: list[str]
) -> None:
    world, run = 4, tmp_path / "run"
    # One microbatch a step, as `validation_step` has it: logits come microbatch by microbatch, and there view by view.
    settings = [f"training.steps={STEPS}", "optimizer.learning_rate=1e-2", "data.accumulation=1", *more]
    lab.train(world, run, *settings, tp=tp, pp=pp, ep=ep)
    layout = [f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.ep={ep}"]
    expected = trained_logits(lab.overrides(run, *layout, *settings), world, lab.cache)
    ranks = world // (tp * pp)
    assert [rank for rank, _ in expected] == list(range(ranks))
    exported, untrained = run_world(_export_and_compare, 1, run, tmp_path / "adapter", lab.cache, ranks)[0]
    for (_, distributed), plain in zip(expected, exported, strict=True):
        assert distributed.shape == plain.shape
        np.testing.assert_allclose(plain, distributed, atol=1e-4, rtol=0)
    assert np.abs(exported[0] - untrained).max() > 0.1, "training changed too little to tell right from wrong"
