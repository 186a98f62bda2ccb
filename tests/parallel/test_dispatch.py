"""All-to-all dispatch against the one-process form, and what capacity, drop policies and padding do."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mome_dist.moe.dispatch import gather
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.experts import initial_value
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.triton.experts import KernelRouting
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from tests.packed import counted, one_view
from tests.parallel.worlds import run_world

HIDDEN, EXPERTS, TOP_K, BOTTLENECK, TOKENS = 16, 6, 2, 3, 30
SHAPE = (HIDDEN, EXPERTS, TOP_K, 1, BOTTLENECK)


def _fill(name: str, value: torch.Tensor) -> None:
    value.copy_(initial_value(f"{name}.down_weight", (*value.shape, 9), 0, "uniform")[..., 0] * 3)


@torch.no_grad()
def _local() -> LocalMoME:
    module = LocalMoME(*SHAPE)
    _fill("router", module.router.get_parameter("weight"))
    for kind, stack in (("routed", module.routed), ("shared", module.shared)):
        assert stack is not None
        for name, parameter in stack.named_parameters():
            for number, value in enumerate(parameter):
                _fill(f"{kind}.{number}.{name}", value)
    return module


@torch.no_grad()
def _parallel(ep: int, **settings: Any) -> ExpertParallelMoME:
    from megatron.core import parallel_state

    module = ExpertParallelMoME(*SHAPE, ep_size=ep, **settings)
    module.set_deepspeed_parallelism()
    module.set_token_group(parallel_state.get_data_parallel_group())
    _fill("router", module.deepspeed_moe.gate.wg.weight)
    first = module.ep_rank * module.num_local_experts
    for local, name, value in _experts(module, module.deepspeed_moe.experts.packed.detach()):
        _fill(f"routed.{first + local}.{name}", value)
    assert module.shared is not None
    for name, parameter in module.shared.named_parameters():
        for number, value in enumerate(parameter):
            _fill(f"shared.{number}.{name}", value)
    return module


def _experts(module: ExpertParallelMoME, values: torch.Tensor) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Number, kind and view of every expert's tensors in something shaped like their parameter."""
    for part in module.deepspeed_moe.experts.parts():
        stop = part.start + math.prod(part.shape)
        yield part.expert, part.part.name, values.view(-1)[part.start : stop].view(part.shape)


def _hidden(rank: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(rank))


def _in_world(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    return run_world(_opened, size, function, size, *args)


def _opened(function: Callable[..., Any], size: int, *args: Any) -> Any:
    with parallel_world(Layout.for_world(size, tp=1, pp=1, ep=size), 0, timeout_seconds=60) as at:
        return function(size, at.dp, *args)


def _passed(module: LocalMoME | ExpertParallelMoME, hidden: torch.Tensor) -> torch.Tensor:
    if isinstance(module, LocalMoME):
        return module(hidden)
    return module(hidden, one_view(len(hidden), multiple=1))  # without what would add an auxiliary loss


def _gradients(module: LocalMoME | ExpertParallelMoME, rank: int) -> dict[str, torch.Tensor]:
    """Output, input gradient and this rank's expert gradients by name; ranks hold different numbers of tokens."""
    hidden = _hidden(rank, TOKENS + 7 * rank).requires_grad_()
    output = _passed(module.train(), hidden)
    output.square().sum().backward()
    assert hidden.grad is not None
    return {"output": output.detach(), "input": hidden.grad}


def _grad(module: torch.nn.Module, name: str) -> np.ndarray:
    gradient = module.get_parameter(name).grad
    assert gradient is not None
    return gradient.numpy()


def _compare(ep: int, rank: int, dispatch: str, kernel: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Outputs and gradients of the one-process form on all ranks' tokens, and of the distributed form on its own, in
    PyTorch's form or by the Triton kernels in their interpreter."""
    gather.runs_as_one_kernel = lambda *_: kernel  # in this fork
    parallel, pairs = _parallel(ep, dispatch=dispatch), {}
    mine = _gradients(parallel, rank)
    assert isinstance(parallel.deepspeed_moe.routing, KernelRouting) is kernel
    local = _local()
    for other in range(ep):  # gradients add up over the tokens of all ranks
        theirs = _gradients(local, other)
        if other == rank:
            pairs = {name: (theirs[name].numpy(), mine[name].numpy()) for name in mine}
    first = parallel.ep_rank * parallel.num_local_experts
    gradient = parallel.deepspeed_moe.experts.packed.grad
    assert gradient is not None
    for number, name, value in _experts(parallel, gradient):
        pairs[f"expert {first + number} {name}"] = (_grad(local.routed, name)[first + number], value.numpy())
    assert local.shared is not None and parallel.shared is not None
    for name, parameter in parallel.shared.named_parameters():
        assert parameter.grad is not None
        mean = parameter.grad.clone()  # of this rank's tokens; the engine reduces it
        torch.distributed.all_reduce(mean)
        pairs[f"shared {name}"] = (_grad(local.shared, name), mean.numpy())
    return pairs


@pytest.mark.parametrize(
    ("ep", "dispatch"),
    [(1, "alltoall"), (2, "alltoall"), (3, "alltoall"), (1, "local"), (1, "gather"), (2, "gather"), (3, "gather")],
)
def test_dropless_dispatch_equals_the_local_form(ep: int, dispatch: str, kernel: bool = False) -> None:
    for pairs in _in_world(ep, _compare, dispatch, kernel):
        assert len(pairs) == 2 + 4 * EXPERTS // ep + 4
        for name, (expected, actual) in pairs.items():
            # A few times the rounding of fp32, of the largest value.
            error = np.abs(expected - actual).max() / np.abs(expected).max()
            assert error < 1e-6, (name, error)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu has them on a GPU")
@pytest.mark.parametrize(("ep", "dispatch"), [(1, "local"), (2, "gather")])
def test_so_do_the_triton_kernels(ep: int, dispatch: str) -> None:
    test_dropless_dispatch_equals_the_local_form(ep, dispatch, kernel=True)


def _each_rank_has_all_experts() -> float:
    """Largest difference from the one-process form, of the largest value; ranks count their tokens together."""
    with parallel_world(Layout.for_world(2, tp=1, pp=1, ep=1), 0, timeout_seconds=60) as at:
        hidden = _hidden(at.dp, TOKENS + 7 * at.dp)
        expected = _local()(hidden).detach()
        error = (_passed(_parallel(1).train(), hidden).detach() - expected).abs().max() / expected.abs().max()
        return float(error)


def test_data_parallel_ranks_with_all_experts_each_dispatch_their_own_tokens() -> None:
    assert all(error < 1e-6 for error in run_world(_each_rank_has_all_experts, 2))


def _drops(ep: int, rank: int, policy: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    module = _parallel(ep, capacity_factor=0.5, min_capacity=2, drop_policy=policy).train()
    context = one_view(TOKENS, multiple=1)
    _, load = counted(module, _hidden(), context)
    routing, kept = module.deepspeed_moe.routing, module.deepspeed_moe.kept_TK
    asked, dropped, sizes = load.of(0)[0].split([EXPERTS, EXPERTS, 2])
    assert asked.sum() == TOKENS * TOP_K and sizes.tolist() == [TOKENS, TOKENS]
    assert dropped.equal(torch.bincount(routing.experts_TK[~kept], minlength=EXPERTS))
    capacity = int(np.ceil(TOKENS * TOP_K / EXPERTS * 0.5))
    _, load = counted(module.eval(), _hidden(), context)
    assert module.deepspeed_moe.kept() is None and not load.of(0)[0, EXPERTS:-2].any()
    assert module.deepspeed_moe.kept_TK.all(), "evaluation drops nothing"
    return routing.experts_TK.numpy(), routing.probs_TE.detach().numpy(), kept.numpy(), capacity


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_a_full_expert_keeps_the_tokens_that_its_policy_names(policy: str) -> None:
    experts, probs, kept, capacity = _in_world(1, _drops, policy)[0]
    dropped = 0
    for expert in range(EXPERTS):
        asking = [
            (token, choice) for token in range(TOKENS) for choice in range(TOP_K) if experts[token, choice] == expert
        ]
        if policy == "probs":
            asking.sort(key=lambda route: -probs[route[0], expert])
        assert {route for route in asking if kept[route]} == set(asking[:capacity])
        dropped += max(len(asking) - capacity, 0)
    assert 0 < dropped == (~kept).sum()


def _with_dead_tokens(ep: int, rank: int, dispatch: str) -> tuple[float, float, int]:
    module = _parallel(ep, dispatch=dispatch).train()
    hidden = _hidden()
    output, load = counted(module, hidden, one_view(20, dead=TOKENS - 20, multiple=1))
    assert module.shared is not None
    shared = module.shared(hidden)
    alone, load_alone = counted(module, hidden[:20], one_view(20, multiple=1))
    counts, counts_alone = load.of(0)[0], load_alone.of(0)[0]
    assert counts[EXPERTS:].tolist() == [0] * EXPERTS + [20, TOKENS], "dropped, tokens, positions"
    assert counts_alone[EXPERTS:].tolist() == [0] * EXPERTS + [20, 20]
    assert counts[:EXPERTS].equal(counts_alone[:EXPERTS])
    asked = int(counts[:EXPERTS].sum())
    return float((output[20:] - shared[20:]).abs().max()), float((output[:20] - alone).abs().max()), asked


@pytest.mark.parametrize("dispatch", ["alltoall", "gather"])
def test_dead_tokens_use_no_routed_expert_and_change_no_token(dispatch: str) -> None:
    dead_error, token_error, asked = _in_world(1, _with_dead_tokens, dispatch)[0]
    assert dead_error < 1e-6 and token_error < 1e-6
    assert asked == 20 * TOP_K


def _unequal_capacity(ep: int, rank: int) -> float:
    """Ranks with different numbers of tokens agree on one capacity, or the exchange would not fit."""
    module = _parallel(ep, capacity_factor=0.8).train()
    tokens = 10 + 25 * rank
    return float(counted(module, _hidden(rank, tokens), one_view(tokens, multiple=1))[0].abs().sum())


def test_ranks_of_unequal_size_agree_on_the_capacity() -> None:
    assert all(np.isfinite(_in_world(2, _unequal_capacity)))


def _loads(ep: int, rank: int) -> tuple[list[int], list[int], np.ndarray, np.ndarray]:
    """What is counted over all ranks, and this rank's own routes: all, and those that got no slot."""
    module = _parallel(ep, capacity_factor=0.5, min_capacity=2).train()
    tokens, dead = [7, 26][rank], [3, 9][rank]
    _, load = counted(module, _hidden(rank, tokens + dead), one_view(tokens, dead=dead, multiple=1))
    routing, kept = module.deepspeed_moe.routing, module.deepspeed_moe.kept_TK[:tokens]
    asked_and_sizes, dropped = load.of(0)[0, [*range(EXPERTS), -2, -1]], load.of(0)[0, EXPERTS:-2]
    experts = routing.experts_TK[:tokens]
    return asked_and_sizes.tolist(), dropped.tolist(), experts.flatten().numpy(), experts[~kept].numpy()


def test_loads_and_drops_are_those_of_all_ranks() -> None:
    loads, dropped, asked, lost = zip(*_in_world(2, _loads), strict=True)
    assert loads[0] == loads[1] and dropped[0] == dropped[1]
    assert loads[0][:EXPERTS] == np.bincount(np.concatenate(asked), minlength=EXPERTS).tolist()
    assert loads[0][EXPERTS:] == [7 + 26, 10 + 35]
    assert dropped[0] == np.bincount(np.concatenate(lost), minlength=EXPERTS).tolist()
    assert sum(dropped[0]) > 0
