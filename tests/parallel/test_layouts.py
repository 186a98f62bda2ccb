"""Every layout trains the model that one process trains: losses, gradients, gradient norm, weights after steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mome_dist.config.schema import OptimizerConfig
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.training.engine import Engine
from mome_dist.training.step import forward_backward
from tests.parallel import toy
from tests.parallel.worlds import run_world

BATCH, STEPS = 8, 3
# fp32 sums in another order differ by about 1e-7 of their largest term. AdamW divides a gradient by its own size, so
# with the usual epsilon of 1e-8 a gradient that is a difference of large terms would turn that into a visible part of
# the rate. At 1e-4 the update moves by at most rate x 1e-7 / 1e-4 = 1e-5 a unit of gradient, whatever the gradient's
# size.
EPSILON = 1e-4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_llama(tmp_path_factory.mktemp("llama"))


def _train(directory: Path, placement: str, layout: Layout, optimizer: str, zero: int, scratch: Path) -> dict[str, Any]:
    """Train a few steps on one rank; return losses, norms, and the local weights by global name."""
    config = scratch / f"zero{zero}.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": zero}} if zero else {}))
    settings = OptimizerConfig(
        name=optimizer,
        learning_rate=0.5 if optimizer == "sgd" else 1e-2,
        gradient_clipping=0.5,
        warmup_steps=0,
        epsilon=EPSILON,
    )
    with parallel_world(layout, toy.SEED, timeout_seconds=60) as at:
        model = toy.distributed(directory, placement, layout.ep, balance_loss=0.1, z_loss=0.01)
        engine = Engine(model.trainable_modules(), settings, config)
        losses, norms = [], []
        for number in range(STEPS):
            step = toy.step_of(list(range(number * BATCH, (number + 1) * BATCH)), at.dp, layout.dp)
            with engine.accumulate():
                losses.append(forward_backward(model, step).loss)
            engine.step(settings.learning_rate)
            norms.append(engine.gradient_norm)
        weights = {(g.name, g.index): p.detach().numpy().copy() for g, p in model.named_trainables()}
    return {"losses": losses, "norms": norms, "weights": weights}


def _merge(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The whole model from all ranks; copies of a parameter must agree exactly."""
    merged: dict[tuple[str, int | None], np.ndarray] = {}
    for result in results:
        for key, value in result["weights"].items():
            np.testing.assert_allclose(merged.setdefault(key, value), value, rtol=0, atol=1e-6, err_msg=str(key))
    names: dict[str, np.ndarray] = {}
    for (name, index), value in sorted(merged.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        names[name] = value if index is None else np.concatenate([names.get(name, value[None][:0]), value[None]])
    return names


def _reference(directory: Path, placement: str, optimizer: str) -> dict[str, Any]:
    """The same training with Hugging Face's Llama, autograd and torch's optimiser: no Megatron-Core, no DeepSpeed."""
    model = toy.reference(directory, placement)
    named = dict(model.named_parameters())
    if optimizer == "sgd":
        stepper: torch.optim.Optimizer = torch.optim.SGD(named.values(), lr=0.5)
    else:
        stepper = torch.optim.AdamW(named.values(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1, eps=EPSILON)
    losses, norms = [], []
    for number in range(STEPS):
        step = toy.step_of(list(range(number * BATCH, (number + 1) * BATCH)), 0, 1)
        total = 0.0
        for batch in step.microbatches:
            loss = model.loss(batch.view, batch.tokens, batch.audio, batch.video)
            loss = loss / (step.label_tokens * len(step.views))
            total += loss.item()
            aux = model.auxiliary_loss(~batch.tokens.padding_BS, 0.1, 0.01) / len(step.microbatches)
            (loss + aux).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), 0.5).item())
        stepper.step()
        stepper.zero_grad()
        losses.append(total)
    return {"losses": losses, "norms": norms, "weights": {n: p.detach().numpy() for n, p in named.items()}}


LAYOUTS = [(1, 1, 1, 1, 1), (2, 1, 1, 1, 1), (2, 1, 2, 1, 1), (2, 2, 1, 1, 0), (4, 2, 2, 1, 1), (8, 2, 2, 2, 1)]


@pytest.mark.parametrize(("world", "tp", "pp", "ep", "zero"), LAYOUTS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_layout_equals_hugging_face_in_one_process(
    llama: Path, tmp_path: Path, world: int, tp: int, pp: int, ep: int, zero: int, optimizer: str
) -> None:
    layout = Layout.for_world(world, tp=tp, pp=pp, ep=ep)
    results = run_world(_train, world, llama, "mhsa", layout, optimizer, zero, tmp_path)
    expected = run_world(_reference, 1, llama, "mhsa", optimizer)[0]
    for result in results:
        np.testing.assert_allclose(result["norms"], expected["norms"], rtol=1e-5)
        np.testing.assert_allclose(result["losses"], expected["losses"], rtol=1e-5)
    weights = _merge(results)
    assert weights.keys() == expected["weights"].keys()
    for name, value in weights.items():
        np.testing.assert_allclose(value, expected["weights"][name], rtol=1e-5, atol=1e-5, err_msg=name)
