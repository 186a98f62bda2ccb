"""Balancing by a bias, and counts of routing: every layout against a plain recount in one process, and over resumes."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mome_dist.checkpoint.format import CheckpointReader, find_checkpoint
from mome_dist.config.schema import MoMEConfig, OptimizerConfig, RunConfig, TaskConfig
from mome_dist.engine.engine import Engine
from mome_dist.inference.load import load_run
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routing import Routing
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.training.balance import update_routers
from mome_dist.training.metrics import gather_routing
from mome_dist.training.step import forward_backward
from mome_dist.verification.probe import write_random_llama
from tests.parallel import toy
from tests.parallel.runs import Lab, lines
from tests.parallel.worlds import run_world

BATCH, STEPS, RATE, LEARNING_RATE = 8, 3, 0.02, 0.5
EXPERTS = int(toy.MOME["routed_experts"])
ROUTER: dict[str, Any] = {"router": RouterSpec(score="sigmoid", bias_rate=RATE)}
CONFIG = RunConfig(
    mome=MoMEConfig(routed_experts=EXPERTS),
    task=TaskConfig(
        tasks=["asr", "vsr", "avsr"],
        asr_audio_rates=[4],
        vsr_video_rates=[2],
        avsr_audio_rates=[4],
        avsr_video_rates=[5],
    ),
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_llama(tmp_path_factory.mktemp("llama"))


def _train(directory: Path, layout: Layout) -> dict[str, Any]:
    """Train a few steps on one rank; return its biases and what all ranks counted."""
    zero = {"zero_optimization": {"stage": 1}}
    settings = OptimizerConfig(name="sgd", learning_rate=LEARNING_RATE, gradient_clipping=0.5, warmup_steps=0)
    with parallel_world(layout, toy.SEED, timeout_seconds=60) as at:
        model = toy.distributed(directory, "mhsa", layout, balance_loss=0.1, **ROUTER)
        engine = Engine(model, settings, zero, layout.sequence_parallel)
        for number in range(STEPS):
            step = toy.step_of(_batch(number), at.dp, layout.dp)
            with engine.accumulate():
                forward_backward(model, step)
            engine.step(settings.learning_rate)
            update_routers(model)
        counts = gather_routing(model, CONFIG)
        assert not any(chunk.statistics.take() for chunk in model.parts())
        biases = {bias.name: bias.value.tolist() for bias in model.router_states()}
    return {"biases": biases, "total": counts.record(), "by_view": counts.by_view()}


def _batch(number: int) -> list[int]:
    return list(range(number * BATCH, (number + 1) * BATCH))


def _reference(directory: Path) -> dict[str, Any]:
    """The same training by Hugging Face's Llama and autograd; tokens are counted one by one, biases moved by hand."""
    model = toy.reference(directory, "mhsa", **ROUTER)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    seen: list[list[Routing]] = [[] for _ in model.momes]  # by layer, of the views of a pass in order
    for mome, routings in zip(model.momes, seen, strict=True):
        mome.observer = routings.append
    asked: Counter[tuple[str, int, int]] = Counter()
    tokens: Counter[str] = Counter()
    positions: Counter[str] = Counter()
    for number in range(STEPS):
        step, load = toy.step_of(_batch(number), 0, 1), np.zeros((len(model.momes), EXPERTS))
        for batch in step.microbatches:
            loss = model.loss(batch.tokens, batch.features) / (step.label_tokens * len(step.views))
            (loss + model.auxiliary_loss(0.1, 0.0) / len(step.microbatches)).backward()
            context = batch.tokens.context
            rows = len(context.lengths) // len(step.views)
            for number, view in enumerate(map(str, step.views)):
                lengths = context.lengths[number * rows : (number + 1) * rows]
                tokens[view] += sum(lengths)
                positions[view] += sum(lengths)
                for layer, routings in enumerate(seen):
                    # Sequences of a view lie side by side, padded to the longest.
                    chosen_BSK = routings[number].experts_TK.view(rows, max(lengths), -1)
                    for sequence, length in zip(chosen_BSK.tolist(), lengths, strict=True):
                        for expert in itertools.chain.from_iterable(sequence[:length]):
                            asked[view, layer, expert] += 1
                            load[layer, expert] += 1
            positions[str(step.views[-1])] += context.tokens - sum(context.lengths)
            for routings in seen:
                assert len(routings) == len(step.views)
                routings.clear()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        for layer, mome in enumerate(model.momes):
            assert mome.router.bias is not None
            for expert in range(EXPERTS):
                above = load[layer, expert] - load[layer].mean()
                mome.router.bias[expert] += RATE if above < 0 else -RATE if above > 0 else 0.0
    biases = {name: bias.tolist() for name, bias in model.state_dict().items() if name.endswith("router_bias")}
    return {"biases": biases, "asked": asked, "tokens": tokens, "positions": positions}


LAYOUTS = {
    "one process": (1, Layout.for_world(1)),
    "ep 2": (2, Layout.for_world(2, ep=2)),
    "pp 2, recomputed": (2, Layout.for_world(2, pp=2, recompute="full")),
    "tp 2, sequence parallel": (2, Layout.for_world(2, tp=2, sequence_parallel=True)),
    "tp 2, pp 2, ep 2": (8, Layout.for_world(8, tp=2, pp=2, ep=2)),
}


@pytest.fixture(scope="module")
def expected(llama: Path) -> dict[str, Any]:
    found: dict[str, Any] = run_world(_reference, 1, llama)[0]
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_biases_and_counts_equal_a_plain_recount(llama: Path, expected: dict[str, Any], name: str) -> None:
    world, layout = LAYOUTS[name]
    results = run_world(_train, world, llama, layout)
    biases: dict[str, list[float]] = {}
    for result in results:
        for key, bias in result["biases"].items():
            assert biases.setdefault(key, bias) == bias, "ranks disagree"
    assert biases.keys() == expected["biases"].keys()
    for key, bias in biases.items():
        assert bias == pytest.approx(expected["biases"][key], abs=1e-7)
        assert max(map(abs, bias)) > RATE / 2
    for result in results:
        assert list(result["by_view"]) == [str(view) for view in toy.VIEWS]
        for view, record in result["by_view"].items():
            layers = range(len(biases))
            assert record["asked"] == [[expected["asked"][view, n, e] for e in range(EXPERTS)] for n in layers]
            assert not np.any(record["dropped"])
            assert record["tokens"] == expected["tokens"][view]
            if name == "one process":  # more ranks have other numbers of dead tokens
                assert record["positions"] == expected["positions"][view]
            assert record["positions"] >= record["tokens"]
        total = np.sum([record["asked"] for record in result["by_view"].values()], axis=0)
        assert result["total"]["asked"] == total.tolist()
        assert result["total"]["tokens"] == sum(expected["tokens"].values())


BIAS = ("mome.score=sigmoid", "mome.bias_rate=0.01", "training.steps=6", "training.save_every=3")


def _biases(run: Path) -> dict[str, list[float]]:
    with CheckpointReader(find_checkpoint(run)) as reader:
        return {name: reader.read(name).tolist() for name in reader.names("model/") if name.endswith("router_bias")}


def _decoding_biases(run: Path, cache: Path) -> dict[str, list[float]]:
    os.environ["MOME_DIST_CACHE"] = str(cache)
    return {
        f"model/mome.{layer}.router_bias": mome.router.bias.tolist()
        for layer, mome in enumerate(load_run(run).model.momes)
        if mome.router.bias is not None
    }


def _by_view(records: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Tokens and asked routes of each view, over all lines."""
    sums: dict[str, Counter[str]] = {}
    for record in records:
        for view, part in record.get("by_view", {}).items():
            values = {"tokens": part["tokens"], "asked": int(np.sum(part["asked"]))}
            sums.setdefault(view, Counter()).update(values)
    return sums


def test_biases_and_counts_survive_a_resume_at_another_layout(lab: Lab, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    losses = lab.train(2, whole, *BIAS, ep=2)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints/step-000006")
    (broken / "checkpoints/latest").write_text("step-000003")
    with pytest.raises(RuntimeError, match=r"trained with a router bias: set mome\.bias_rate above 0"):
        lab.train(1, broken, *BIAS, "mome.bias_rate=0")
    rest = lab.train(4, broken, *BIAS, tp=2, pp=2)
    np.testing.assert_allclose(rest, losses[3:], rtol=1e-5)

    biases = _biases(whole)
    assert len(biases) == 4 and all(max(map(abs, bias)) > 0.005 for bias in biases.values())
    assert _biases(broken) == biases
    assert run_world(_decoding_biases, 1, whole, lab.cache)[0] == biases

    records, others = lines(whole / "routing.jsonl"), lines(broken / "routing.jsonl")
    assert [record["step"] for record in records] == [record["step"] for record in others] == [3, 6]
    sums = _by_view(records)
    assert _by_view(others) == sums
    top_k = 4
    for record in records:
        assert np.sum(record["asked"], axis=1).tolist() == [top_k * record["tokens"]] * 4
    assert sum(part["tokens"] for part in sums.values()) == sum(record["tokens"] for record in records)
    _check_tensorboard(whole, records[-1])


def _check_tensorboard(run: Path, record: dict[str, Any]) -> None:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    asked = np.asarray(record["asked"], dtype=np.float64)
    by_layer = asked.max(axis=1) / asked.mean(axis=1)
    values = {tag: board.Scalars(tag)[-1].value for tag in board.Tags()["scalars"]}
    assert values["routing/tokens"] == record["tokens"]
    assert values["routing/padding_share"] == pytest.approx(1 - record["tokens"] / record["positions"])
    assert values["routing/load_max_over_mean"] == pytest.approx(by_layer.mean())
    for layer in range(4):
        assert values[f"routing_load_max_over_mean/layer_{layer:02d}"] == pytest.approx(by_layer[layer])
        assert 0 < values[f"routing_normalized_entropy/layer_{layer:02d}"] <= 1
        assert values[f"routing_drop_rate/layer_{layer:02d}"] == 0


def test_a_bias_balances_a_training_run(lab: Lab, tmp_path: Path) -> None:
    """Without any balance loss, the same run with and without a bias."""
    settings = ("mome.score=sigmoid", "mome.balance_loss=0", "training.steps=30", "training.save_every=0")
    imbalance = {}
    for rate in (0.0, 0.01):
        run = tmp_path / f"rate{rate}"
        lab.train(1, run, *settings, f"mome.bias_rate={rate}")
        asked = np.asarray(lines(run / "routing.jsonl")[-1]["asked"], dtype=np.float64)
        imbalance[rate] = float((asked.max(axis=1) / asked.mean(axis=1)).mean())
    assert imbalance[0.01] < 1 + 0.6 * (imbalance[0.0] - 1), imbalance
