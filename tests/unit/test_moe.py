"""Router, balance losses and the local MoME against loops and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mome_dist.moe.balance import load_balance_loss, router_z_loss
from mome_dist.moe.experts import ExpertStack, initial_value
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.router import route
from mome_dist.moe.statistics import RoutingStatistics


def _logits(tokens: int = 40, experts: int = 8) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))


def test_gates_are_the_largest_probabilities() -> None:
    logits = _logits()
    routing = route(logits, top_k=3, renormalize=False)
    probabilities = logits.softmax(-1)
    for token in range(len(logits)):
        best = sorted(range(8), key=lambda e: -probabilities[token, e])[:3]
        assert routing.experts_TK[token].tolist() == best
        torch.testing.assert_close(routing.gates_TK[token], probabilities[token, best])


def test_renormalized_gates_sum_to_one_and_keep_their_ratios() -> None:
    plain, normal = route(_logits(), 3, renormalize=False), route(_logits(), 3, renormalize=True)
    torch.testing.assert_close(normal.gates_TK.sum(-1), torch.ones(40))
    torch.testing.assert_close(
        normal.gates_TK[:, 0] / normal.gates_TK[:, 1], plain.gates_TK[:, 0] / plain.gates_TK[:, 1]
    )


def test_the_router_is_fp32_for_bf16_logits() -> None:
    assert route(_logits().bfloat16(), 2, renormalize=True).gates_TK.dtype is torch.float32


def test_padding_gets_no_gate_and_no_count() -> None:
    valid = torch.arange(40) < 25
    routing = route(_logits(), 3, True, valid)
    assert routing.gates_TK[25:].eq(0).all() and routing.gates_TK[:25].gt(0).all()
    assert int(routing.selected_TE().sum()) == 25 * 3


def test_balance_loss_is_one_when_uniform_and_e_over_k_when_collapsed() -> None:
    experts, top_k, tokens = 8, 2, 64
    uniform = route(torch.zeros(tokens, experts), top_k, True)
    even = torch.full((experts,), tokens * top_k / experts)
    assert load_balance_loss(uniform, even, torch.tensor(tokens)).item() == pytest.approx(1.0)
    logits = torch.full((tokens, experts), -30.0)
    logits[:, :top_k] = 30.0
    collapsed = route(logits, top_k, True)
    counts = collapsed.selected_TE().sum(0)
    assert load_balance_loss(collapsed, counts, torch.tensor(tokens)).item() == pytest.approx(experts / top_k)


def test_shards_of_a_batch_add_up_to_its_losses() -> None:
    logits = _logits()
    whole = route(logits, 3, True)
    counts, tokens = whole.selected_TE().sum(0), torch.tensor(len(logits))
    shards = [route(part, 3, True) for part in logits.split([10, 25, 5])]
    for loss in (lambda r: load_balance_loss(r, counts, tokens), lambda r: router_z_loss(r, tokens)):
        torch.testing.assert_close(sum(loss(shard) for shard in shards), loss(whole))
    expected_z = logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(router_z_loss(whole, tokens), expected_z)


def _mome(shared: int, renormalize: bool = True) -> LocalMoME:
    module = LocalMoME(16, routed_experts=6, top_k=2, shared_experts=shared, bottleneck=3, renormalize=renormalize)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return module


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("renormalize", [True, False])
def test_local_mome_is_the_papers_equation(shared: int, renormalize: bool) -> None:
    module = _mome(shared, renormalize)
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))

    def expert(stack: ExpertStack, n: int, h: torch.Tensor) -> torch.Tensor:
        return stack.up_weight[n] @ F.gelu(stack.down_weight[n] @ h + stack.down_bias[n]) + stack.up_bias[n]

    output = module(hidden)
    for token, result in zip(hidden.flatten(0, 1), output.flatten(0, 1), strict=True):
        gates = (module.router_weight @ token).softmax(0)
        best = gates.topk(2)
        weights = best.values / best.values.sum() if renormalize else best.values
        expected = sum(w * expert(module.routed, int(n), token) for w, n in zip(weights, best.indices, strict=True))
        for n in range(shared):
            assert module.shared is not None
            expected = expected + expert(module.shared, n, token)
        torch.testing.assert_close(result, expected)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    module = _mome(1)
    hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([module(token[None]) for token in hidden])
    torch.testing.assert_close(module(hidden), alone, rtol=0, atol=1e-6)


def test_an_untrained_module_adds_nothing() -> None:
    module = LocalMoME(16, 6, 2, 1, 3)
    module.initialize("mome.0", seed=0)
    assert module(torch.randn(4, 16)).eq(0).all()
    assert module.router_weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_initial_values_depend_on_name_and_seed_only() -> None:
    first = initial_value("mome.1.routed.4.down_weight", (3, 16), seed=5)
    assert first.equal(initial_value("mome.1.routed.4.down_weight", (3, 16), seed=5))
    assert not first.equal(initial_value("mome.1.routed.5.down_weight", (3, 16), seed=5))
    assert not first.equal(initial_value("mome.1.routed.4.down_weight", (3, 16), seed=6))


def test_statistics_add_up_until_taken() -> None:
    statistics = RoutingStatistics(3)
    for dropped in (torch.tensor([0, 1, 0]), torch.tensor([2, 0, 0])):
        statistics.add(torch.tensor([5, 4, 3]), dropped)
    assert statistics.take().tolist() == [[10, 8, 6], [2, 1, 0]]
    assert statistics.take().eq(0).all()


def test_padding_selects_no_expert() -> None:
    routing = route(_logits(4, 3), 1, True, torch.tensor([True, True, True, False]))
    assert routing.selected_TE().sum(dim=1).tolist() == [1, 1, 1, 0]
