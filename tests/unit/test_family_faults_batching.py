"""Faults of public code for this family that concern batches: each check passes here and fails where the fault is.

5: a loss that is averaged twice, so that tokens of small batches weigh more. 6: batches that are composed once, and
ranks that draw different rates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mome_dist.config import RunConfig, load_config
from mome_dist.data import order
from mome_dist.data.order import BatchOrder, FrameOrder, Order
from mome_dist.model.distributed import Chunk, MicroBatch
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.preflight import validate
from mome_dist.speech.views import View, ViewSchedule
from mome_dist.training import loop
from mome_dist.training.batches import BatchBuilder, Step
from mome_dist.training.step import forward_backward
from mome_dist.verification.probe import write_random_llama
from tests.parallel import toy
from tests.parallel.runs import Lab
from tests.parallel.worlds import run_world

BATCH = list(range(7))  # in two chunks over two ranks: microbatches of 2, 2, 2 and 1 utterances


def _average_twice(monkeypatch: pytest.MonkeyPatch, step: Step) -> None:
    """Plant: the mean over the tokens of each microbatch, then the mean over microbatches and ranks."""
    forward = Chunk.forward
    count = len(step.microbatches) * dist.get_world_size()

    def mean_of_microbatch(self: Chunk, batch: MicroBatch, *shares: float) -> torch.Tensor:
        labels = batch.tokens.labels.ids_L.numel() / len(step.views)
        return forward(self, batch, *shares) * step.label_tokens / (labels * count)

    monkeypatch.setattr(Chunk, "forward", mean_of_microbatch)


def _loss_and_gradients(directory: Path, layout: Layout, planted: bool) -> tuple[float, dict[str, np.ndarray]]:
    """Loss of a step, and the gradients of the projectors, summed up as the engine does."""
    with parallel_world(layout, toy.SEED, timeout_seconds=60) as at, pytest.MonkeyPatch.context() as monkeypatch:
        model = toy.distributed(directory, "mhsa", layout, balance_loss=0.0)
        step = toy.step_of(BATCH, at.dp, layout.dp)
        if planted:
            _average_twice(monkeypatch, step)
        loss = forward_backward(model, step).loss
        gradients = {}
        assert model.projectors is not None
        for name, parameter in model.projectors.named_parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            gradients[name] = (parameter.grad / layout.dp).numpy()
    return loss, gradients


def _assert_token_weighted(llama: Path, found: tuple[float, dict[str, np.ndarray]]) -> None:
    """Against Hugging Face's Llama: all cross-entropies of the global batch over all its tokens."""
    model, step = toy.reference(llama, "mhsa"), toy.step_of(BATCH, 0, 1)
    total = torch.zeros(())
    for batch in step.microbatches:
        total = total + model.loss(batch.tokens, batch.features)
    loss = total / (step.label_tokens * len(step.views))
    loss.backward()
    assert found[0] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.projectors.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(found[1][name], parameter.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_fault_05_the_loss_is_a_mean_over_the_tokens_of_the_global_batch(tmp_path: Path) -> None:
    llama = write_random_llama(tmp_path)
    clean, planted = (run_world(_loss_and_gradients, 2, llama, Layout.for_world(2), each)[0] for each in (False, True))
    _assert_token_weighted(llama, clean)
    with pytest.raises(AssertionError):
        _assert_token_weighted(llama, planted)


LENGTHS = np.random.default_rng(5).integers(20, 300, 200).tolist()
ORDERS: list[Callable[[], Order]] = [
    lambda: FrameOrder(LENGTHS, 2000, pool=4, seed=0),
    lambda: FrameOrder(LENGTHS, 2000, pool=1000, seed=0),
    lambda: BatchOrder(LENGTHS, batch_size=10, pool=5, seed=0),
]


def _assert_reshuffled(made: Order) -> None:
    """Hardly a batch of the first epoch comes again in the second."""
    first, second = (
        {frozenset(made.batch(step)) for step in range(made.steps_of(epoch), made.steps_of(epoch + 1))}
        for epoch in (0, 1)
    )
    assert len(first & second) < 0.1 * len(first)


@pytest.mark.parametrize("make", ORDERS, ids=["frames", "frames-one-pool", "utterances"])
def test_fault_06_batches_are_composed_anew_every_epoch(
    make: Callable[[], Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    _assert_reshuffled(make())
    permutation = order.epoch_permutation
    monkeypatch.setattr(order, "epoch_permutation", lambda utterances, seed, epoch: permutation(utterances, seed, 0))
    with pytest.raises(AssertionError):
        _assert_reshuffled(make())


def _views_drawn(overrides: list[str], cache: Path, planted: bool) -> list[list[str]]:
    """The views of every step of a run, on this rank."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    drawn: list[list[str]] = []
    build, schedule_of = BatchBuilder.build, loop.schedule_of

    def of_this_rank(config: RunConfig) -> ViewSchedule:
        return replace(schedule_of(config), seed=config.seed + dist.get_rank())

    def building(self: BatchBuilder, batch: Sequence[int], views: Sequence[View], number: int) -> Step:
        drawn.append([str(view) for view in views])
        return build(self, batch, views, number)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(BatchBuilder, "build", building)
        if planted:
            monkeypatch.setattr(loop, "schedule_of", of_this_rank)
        config = load_config(overrides)
        loop.train(config, validate(config, int(os.environ["WORLD_SIZE"])))
    return drawn


def _assert_same_views(ranks: Sequence[list[list[str]]]) -> None:
    assert len(ranks[0]) == 6 and len({view for views in ranks[0] for view in views}) > 1
    assert all(rank == ranks[0] for rank in ranks)


def test_fault_06_all_ranks_draw_the_same_rates(tiny_corpus_dir: Path, tmp_path: Path) -> None:
    lab = Lab.make(tiny_corpus_dir, tmp_path / "lab")
    # Of one task: gradients of different modules would break the run before it could be seen to train on.
    views = ("task.tasks=[asr]", "task.asr_audio_rates=[2,4,8,16]", "task.views_per_step=1")
    settings = ("data.batch_size=null", "data.max_frames=700", "training.steps=6", *views)
    clean, planted = (
        run_world(_views_drawn, 2, lab.overrides(tmp_path / str(each), "parallel.ep=1", *settings), lab.cache, each)
        for each in (False, True)
    )
    _assert_same_views(clean)
    with pytest.raises(AssertionError):
        _assert_same_views(planted)
