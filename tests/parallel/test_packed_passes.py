"""Passes of training over packed sequences through a whole small model: neighbours change no bit of a sequence, and one
collective counts for all layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mome_dist.model.distributed import Chunk, MicroBatch
from mome_dist.moe.load import PassLoad
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.training.step import forward_backward
from mome_dist.verification.probe import write_random_llama
from tests.parallel import toy
from tests.parallel.worlds import run_world

pytestmark = pytest.mark.parallel

CLIPS, CHANGED, LAYERS = [0, 1, 2], 1, 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_llama(tmp_path_factory.mktemp("llama"), layers=LAYERS)


def _with_another_neighbour(batch: MicroBatch, seed: int) -> MicroBatch:
    """Other words and features in one clip, of the same lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids_N, words_N = batch.tokens.ids_N.clone(), _of_changed_clip(batch) & (batch.tokens.ids_N >= 8)
    ids_N[words_N] = torch.randint(8, 64, (int(words_N.sum()),), generator=generator)
    features = {stream: list(clips) for stream, clips in batch.features.items()}
    for clips in features.values():
        clips[CHANGED] = torch.randn(clips[CHANGED].shape, generator=generator)
    return MicroBatch(replace(batch.tokens, ids_N=ids_N), features)


def _of_changed_clip(batch: MicroBatch) -> torch.Tensor:
    """Bool [N], its tokens in all views."""
    context = batch.tokens.context
    own = [place % len(CLIPS) == CHANGED for place in range(len(context.lengths))]
    own_N = torch.zeros(context.tokens, dtype=torch.bool)
    own_N[: context.alive] = torch.tensor(own).repeat_interleave(torch.tensor(context.lengths))
    return own_N


def _outputs_and_gradients(chunk: Chunk, batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
    """Logits of every token, and the gradient of its embedding as a pass of training has it."""
    context, embedded_NH = batch.tokens.context, chunk.embed(batch).detach().requires_grad_()
    load = PassLoad(context.view_names, chunk.token_group)
    losses_V = chunk.llm(embedded_NH, context, load, batch.tokens.labels)
    load.reduce()
    losses_V.sum().backward()
    assert embedded_NH.grad is not None
    with torch.no_grad():
        return chunk.llm.logits(embedded_NH, context).numpy(), embedded_NH.grad.numpy()


def _of_two_neighbours(directory: Path, layout: Layout, dispatch: str, kernel: str) -> list[tuple[np.ndarray, ...]]:
    with parallel_world(layout, toy.SEED, timeout_seconds=60):
        # The balance loss is made of the load of all sequences: it is the one thing that a neighbour may change.
        model = toy.distributed(directory, "ffn", layout, dispatch=dispatch, balance_loss=0.0)
        (chunk,) = model.parts()
        assert chunk.training
        for layer in chunk.llm.decoder.layers:
            layer.self_attention.core_attention.kernel = kernel
        whole = toy.microbatch(CLIPS)
        assert whole.tokens.context.alive_N is not None, "some tokens are dead"
        changed_N = _of_changed_clip(whole).numpy()
        found = [_outputs_and_gradients(chunk, _with_another_neighbour(whole, seed)) for seed in (1, 2)]
        return [(*each, changed_N) for each in found]


@pytest.mark.parametrize(
    ("dispatch", "layout", "kernel"),
    [
        ("local", Layout.for_world(1), "eager"),
        ("local", Layout.for_world(1), "sdpa"),
        ("local", Layout.for_world(1, recompute="full"), "eager"),
        ("gather", Layout.for_world(2, ep=2), "eager"),
    ],
)
def test_a_neighbour_changes_no_bit_in_training(llama: Path, dispatch: str, layout: Layout, kernel: str) -> None:
    for one, other in run_world(_of_two_neighbours, layout.world_size, llama, layout, dispatch, kernel):
        changed_N = one[2]
        for first, second in zip(one[:2], other[:2], strict=True):
            assert np.isfinite(first).all() and first[~changed_N].any(axis=1).sum() > 0.8 * (~changed_N).sum()
            assert first[~changed_N].tobytes() == second[~changed_N].tobytes()
            assert (first[changed_N] != second[changed_N]).any(axis=1).mean() > 0.8


class _Collectives(TorchDispatchMode):
    """Counts what is sent to other ranks, also by the backward pass, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            boxed = [each for each in args if isinstance(each, torch.ScriptObject)]
            (group,) = [each for each in boxed if each._type().name() == "ProcessGroup"]  # type: ignore[attr-defined]
            self.found[function.overloadpacket.__name__] += dist.ProcessGroup.unbox(group).size() > 1
        return function(*args, **(kwargs or {}))


def _sent(directory: Path, layout: Layout, dispatch: str) -> dict[str, int]:
    """Collectives of one pass, forward and backward."""
    with parallel_world(layout, toy.SEED, timeout_seconds=60) as at:
        model = toy.distributed(directory, "ffn", layout, dispatch=dispatch, balance_loss=0.1, z_loss=0.01)
        (chunk,) = model.parts()
        batch = toy.microbatch([clip + 3 * at.dp for clip in CLIPS])
        with _Collectives() as collectives:
            chunk(batch).sum().backward()
        chunk.statistics.settle()
        assert set(chunk.statistics.take()) == {str(view) for view in toy.VIEWS}
        return {name: count for name, count in collectives.found.items() if count}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_one_collective_counts_for_all_layers(llama: Path, recompute: str) -> None:
    for found in run_world(_sent, 2, llama, Layout.for_world(2, recompute=recompute), "local"):
        assert found == {"allreduce_": 1}


def test_where_weights_travel_counts_still_travel_once(llama: Path) -> None:
    for found in run_world(_sent, 2, llama, Layout.for_world(2, ep=2), "gather"):
        assert found.pop("allreduce_") == 1
        assert sum(found.values()) == 2 * LAYERS, "weights there, gradients back"


def _counted(directory: Path, layout: Layout) -> dict[str, list[list[int]]]:
    with parallel_world(layout, toy.SEED, timeout_seconds=60) as at:
        model = toy.distributed(directory, "ffn", layout, dispatch="local")
        forward_backward(model, toy.step_of(list(range(6)), at.dp, layout.dp))
        (chunk,) = model.parts()
        return {view: counts_LX.tolist() for view, counts_LX in chunk.statistics.take().items()}


def test_a_recomputed_pass_is_not_counted_twice(llama: Path) -> None:
    once = run_world(_counted, 1, llama, Layout.for_world(1))[0]
    assert run_world(_counted, 1, llama, Layout.for_world(1, recompute="full"))[0] == once
    assert list(once) == [str(view) for view in toy.VIEWS]
    for counts in once.values():
        for *routes, tokens, _ in counts:
            assert sum(routes) == int(toy.MOME["top_k"]) * tokens > 0
