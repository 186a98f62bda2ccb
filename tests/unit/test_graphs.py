"""Captured functions on a CPU, where a graph is rehearsed: what is replayed, what stays apart, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mome_dist.config import load_config
from mome_dist.config.values import check_values
from mome_dist.cuda_graphs.kinds import CudaGraphs, graphs_of
from mome_dist.cuda_graphs.rehearsal import RehearsedGraphs
from mome_dist.cuda_graphs.replay import Replayed, Turn
from mome_dist.errors import UserError

Run = Callable[..., tuple[Tensor, ...]]


def _values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _captured(function: Run, *inputs: Tensor, parameters: tuple[Tensor, ...] = ()) -> Replayed:
    return Replayed(RehearsedGraphs(), Turn(), function, inputs, parameters)


@pytest.fixture
def weight() -> Tensor:
    return _values(3, 4, seed=9).requires_grad_()


def _layer(weight: Tensor) -> Run:
    def run(hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        product = torch.nn.functional.gelu(hidden @ weight.t()) * mask[:, None]
        parts = product.new_empty(product.shape)
        parts[:, :2], parts[:, 2:] = product[:, 1:], product[:, :1]
        return parts + parts.square(), product.topk(2, dim=1).indices

    return run


def _pass(run: Callable[..., Any], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and the gradient of the hidden states; the weight's is added up."""
    hidden, mask = _values(5, 4, seed=seed).requires_grad_(), torch.arange(5) != seed
    output, chosen = run(hidden, mask)
    (output * _values(5, 3, seed=seed + 1)).sum().backward()
    return output, chosen, _gradient(hidden)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _like_a_pass() -> tuple[Tensor, Tensor]:
    return _values(5, 4, seed=7).requires_grad_(), torch.ones(5, dtype=torch.bool)


def test_passes_equal_those_without_a_graph_and_stay_apart(weight: Tensor) -> None:
    plain = _layer(weight)
    expected = [_pass(plain, seed) for seed in range(3)]
    total, weight.grad = _gradient(weight), None
    graph = _captured(plain, *_like_a_pass(), parameters=(weight,))
    assert weight.grad is None, "a capture leaves no gradient"
    found = [_pass(graph, seed) for seed in range(3)]
    for mine, theirs in zip(found, expected, strict=True):  # also the first pass, after two more replays
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    assert torch.equal(_gradient(weight), total)
    assert not torch.equal(found[0][0], found[1][0])


def test_the_rehearsal_gives_out_its_buffers_as_torch_does(weight: Tensor) -> None:
    """Why what leaves a graph is copied: autograd takes the first gradient as it is, and the next replay is on it."""
    plain = _layer(weight)
    expected = [_pass(plain, seed)[0] for seed in (0, 1)]
    total, weight.grad = _gradient(weight), None
    graph = RehearsedGraphs()(lambda *given: plain(*given[:2]), (*_like_a_pass(), weight))
    found = [_pass(lambda *inputs: graph(*inputs, weight), seed)[0] for seed in (0, 1)]
    assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[1])
    assert not torch.allclose(_gradient(weight), total)


def test_new_values_of_parameters_are_seen(weight: Tensor) -> None:
    inputs = _like_a_pass()
    graph = _captured(_layer(weight), *inputs, parameters=(weight,))
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(graph(*inputs)[0], _layer(weight)(*inputs)[0])


def test_what_the_host_says_is_said_once() -> None:
    numbers = iter(range(1, 100))
    graph = _captured(lambda values: (values * next(numbers),), torch.ones(2))
    assert [graph(torch.full((2,), scale))[0].tolist() for scale in (1.0, 3.0)] == [[2.0] * 2, [6.0] * 2]
    assert next(numbers) == 3, "once to warm up, once at the capture"


def test_memory_that_nobody_wrote_is_no_number() -> None:
    def run(values: Tensor) -> tuple[Tensor, ...]:
        parts = torch.zeros_like(values).new_empty(4)
        parts[:2] = values[:2]
        return parts, parts[:2] + 1

    whole, written = _captured(run, torch.ones(3))(torch.ones(3))
    assert whole.isnan().tolist() == [False, False, True, True] and written.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda values: (values * values.sum().item(),), "gives the host a value"),
        (lambda values: (values.nonzero(),), "gives as many elements as values say"),
        (lambda values: (values[values > 1],), "looks for what is true in a mask"),
        (lambda values: (values * torch.tensor([1.0, 2.0]),), "tensor copies between host and device"),
    ],
)
def test_what_no_graph_can_do_is_refused(run: Run, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        _captured(run, torch.ones(2))


def test_other_tensors_moved_parameters_and_passes_out_of_turn_are_refused(weight: Tensor) -> None:
    (hidden, mask), turn = _like_a_pass(), Turn()
    graph = Replayed(RehearsedGraphs(), turn, _layer(weight), (hidden, mask), (weight,))
    for wrong in (_values(6, 4).requires_grad_(), hidden.double(), hidden.detach()):
        with pytest.raises(RuntimeError, match="was given"):
            graph(wrong, mask)
    output = graph(hidden, mask)[0]
    with pytest.raises(RuntimeError, match="before the backward pass"):
        graph(hidden, mask)
    output.sum().backward()
    assert not turn.taken
    graph(hidden, mask)[0].sum().backward()
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match="a parameter has moved"):
        graph(hidden, mask)


GRAPHS = ["experiment=tiny", "parallel=single", "llm.graphs=rehearsal", "mome.dispatch=local"]
GRAPHS += ["data.microbatch_tokens=512"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.tp=2", "parallel.tp=2: .* Set parallel.tp=1, or llm.graphs=none"),
        ("parallel.pp=2", "parallel.pp=2: .*several"),
        ("parallel.ep=2", "parallel.ep=2"),
        ("parallel.recompute=full", "Set parallel.recompute=none"),
        ("llm.lora={rank: 4}", "Set llm.lora=null"),
        ("llm.sink_loss=1", "Set llm.sink_loss=0"),
        ("mome/router=separate", "mome.router.name=separate"),
        ("mome=lora", "mome.placement=qv: .* Set mome.placement=mhsa"),
        ("mome.dispatch=auto", "mome.dispatch=auto: .* Set mome.dispatch=local"),
        ("data.microbatch_tokens=null", "needs data.microbatch_tokens"),
    ],
)
def test_what_graphs_do_not_go_with_is_named(override: str, words: str) -> None:
    check_values(load_config(GRAPHS))
    with pytest.raises(UserError, match=rf"llm.graphs=rehearsal .*{words}"):
        check_values(load_config([*GRAPHS, override]))
    check_values(load_config([*GRAPHS, override, "llm.graphs=none"]))


def test_cuda_graphs_need_a_gpu() -> None:
    with pytest.raises(UserError, match=r"llm.graphs=cuda needs a GPU.*set llm.graphs=none"):
        graphs_of("cuda", torch.device("cpu"))
    assert isinstance(graphs_of("cuda", torch.device("cuda", 0)), CudaGraphs)
    assert isinstance(graphs_of("rehearsal", torch.device("cpu")), RehearsedGraphs)
