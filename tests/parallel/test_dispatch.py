"""All-to-all dispatch against the one-process form, and what capacity, drop policies and padding do."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mome_dist.config import load_config
from mome_dist.config.derived import router_of
from mome_dist.moe.dispatch import gather
from mome_dist.moe.dispatch.alltoall import AllToAllDispatch
from mome_dist.moe.dispatch.drops import kept, rerouted
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.experts import initial_value
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.routing import gates_again
from mome_dist.moe.triton.experts import KernelRouting
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.token_context import TokenContext
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


ROUTED: dict[str, dict[str, Any]] = {
    "separate": {},
    "null_experts": {},
    "condition": {},
    "top_k": {"drop_policy": "reroute"},
}
VIEWS = ("asr(4)", "vsr(2)", "avsr(16,5)")


def _several_views(rank: int) -> TokenContext:
    """Make an utterance of each view, with dead tokens behind; ranks have different numbers of them."""
    lengths = [8 + 3 * rank, 6, 9]
    return TokenContext.of([(view, [n]) for view, n in zip(VIEWS, lengths, strict=True)], multiple=1, least=26 + rank)


def _with_capacity(ep: int, rank: int) -> dict[str, tuple[float, int, int]]:
    """Tell of routers with a capacity how far outputs and gradients are from the one-process form whose gates are zero
    where a route has no slot; routes of this rank without one; the most of its rows that an expert takes."""
    from megatron.core import parallel_state

    found = {}
    for name, settings in ROUTED.items():
        words = ["mome.routed_experts=6", "mome.top_k=2", "task.asr_audio_rates=[4]", "task.vsr_video_rates=[2]"]
        words += ["task.avsr_audio_rates=[16]", "task.avsr_video_rates=[5]", f"mome/router={name}"]
        spec = router_of(load_config(["experiment=tiny", *words]))
        local = LocalMoME(*SHAPE, spec)
        parallel = ExpertParallelMoME(*SHAPE, spec, ep_size=ep, capacity_factor=0.6, min_capacity=2, **settings)
        parallel.set_deepspeed_parallelism()
        parallel.set_token_group(parallel_state.get_data_parallel_group())
        for module in (local, parallel):
            module.initialize("mome.0", 3)
            for parameter in module.router.parameters():
                parameter.data.mul_(20)
        with torch.no_grad():
            assert isinstance(local.routed.up_weight, torch.Tensor)
            local.routed.up_weight.normal_(generator=torch.Generator().manual_seed(1))
            for number, kind, value in _experts(parallel, parallel.deepspeed_moe.experts.packed):
                value.copy_(getattr(local.routed, kind)[parallel.ep_rank * (EXPERTS // ep) + number])
        context = _several_views(rank)
        hidden = _hidden(rank, context.tokens).requires_grad_()
        output = parallel.train()(hidden, context)
        (gradient,) = torch.autograd.grad(output.square().sum(), hidden)
        again = hidden.detach().requires_grad_()
        routing, dispatch = local.router(again, context), parallel.deepspeed_moe
        assert isinstance(dispatch, AllToAllDispatch) and dispatch.capacity is not None
        experts_TK, taken_TK = routing.experts_TK, kept(routing, dispatch.capacity, dispatch.drop_policy)
        gates_TK = routing.gates_TK
        assert dispatch.kept_TK is not None and dispatch.kept_TK.equal(taken_TK)
        if dispatch.drop_policy == "reroute":
            experts_TK, taken_TK = rerouted(routing, taken_TK, dispatch.capacity, None)
            gates_TK = gates_again(routing, experts_TK, spec.renormalize, spec.score)
        gates_TE = torch.zeros(context.tokens, EXPERTS).scatter_add(1, experts_TK, gates_TK * taken_TK)
        assert local.shared is not None
        weights = local.routed.weights(), gates_TE, local.shared.weights()
        expected = local.routed.form.dense(again, *weights)
        (expected_gradient,) = torch.autograd.grad(expected.square().sum(), again)
        pairs = ((output, expected), (gradient, expected_gradient))
        error = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
        alive = slice(0, context.alive)
        chosen_TK = torch.ones_like(taken_TK) if routing.chosen_TK is None else routing.chosen_TK
        lost = int((chosen_TK[alive] & ~taken_TK[alive]).sum())
        most = int(torch.bincount(experts_TK[taken_TK], minlength=EXPERTS).max())
        found[name] = error, lost, most - dispatch.capacity
    return found


def test_full_experts_of_other_routers_and_policies_are_the_local_form_without_what_they_drop() -> None:
    for found in _in_world(2, _with_capacity):
        for name, (error, lost, over) in found.items():
            assert error < 1e-6 and lost > 0 and over <= 0, (name, error, lost, over)


def _by_nodes(ep: int, rank: int) -> list[list[np.ndarray]]:
    """Output, gradients of the input and of this rank's experts, without a capacity and with one, in one step and in
    two."""
    found, cases = [], list[dict[str, Any]]([{}, {"capacity_factor": 0.5, "min_capacity": 2}])
    for settings in cases:
        for nodes in (1, 2, 4):
            module = _parallel(ep, dispatch="alltoall", alltoall_nodes=nodes, **settings)
            gradients = _gradients(module, rank)
            experts = module.deepspeed_moe.experts.packed.grad
            assert experts is not None
            found.append([each.numpy() for each in (*gradients.values(), experts)])
    return found


def test_tokens_that_travel_in_two_steps_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks as one, two and four nodes; ranks have different numbers of tokens."""
    monkeypatch.setitem(globals(), "EXPERTS", 8)
    monkeypatch.setitem(globals(), "SHAPE", (HIDDEN, 8, TOP_K, 1, BOTTLENECK))
    for found in _in_world(4, _by_nodes):
        for whole, *others in (found[:3], found[3:]):
            for other in others:
                assert all(np.array_equal(one, two) for one, two in zip(whole, other, strict=True))
        assert not np.array_equal(found[0][0], found[3][0]), "nothing was dropped"
