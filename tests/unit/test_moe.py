"""Router, balance losses and the local MoME against loops and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mome_dist.moe.balance import load_balance_loss, router_z_loss, updated_bias
from mome_dist.moe.experts import ExpertStack, initial_value
from mome_dist.moe.fused_bottleneck import dense_experts
from mome_dist.moe.load import PassLoad
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routing import route
from mome_dist.moe.statistics import RoutingCounts, RoutingStatistics
from mome_dist.token_context import TokenContext


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


@pytest.mark.parametrize("renormalize", [True, False])
def test_sigmoid_gates_are_scores_over_the_sum_of_the_chosen(renormalize: bool) -> None:
    logits = _logits()
    routing = route(logits, 3, renormalize, score="sigmoid")
    for token in range(len(logits)):
        scores = [1 / (1 + math.exp(-logit)) for logit in logits[token].tolist()]
        best = sorted(range(8), key=lambda e: -scores[e])[:3]
        whole = sum(scores[e] for e in best) if renormalize else 1.0
        assert routing.experts_TK[token].tolist() == best
        assert routing.gates_TK[token].tolist() == pytest.approx([scores[e] / whole for e in best], rel=1e-5)
        assert routing.probs_TE[token].tolist() == pytest.approx([s / sum(scores) for s in scores], rel=1e-5)


def test_sigmoid_gates_survive_logits_that_no_sigmoid_can_hold() -> None:
    logits = torch.tensor([[-200.0, -201.0, -300.0], [40.0, 60.0, 50.0]], requires_grad=True)
    routing = route(logits, 2, True, score="sigmoid")
    assert routing.experts_TK.tolist() == [[0, 1], [1, 2]]
    odds = 1 / (1 + math.exp(-1))  # exp(-200) against exp(-201)
    assert routing.gates_TK.flatten().tolist() == pytest.approx([odds, 1 - odds, 0.5, 0.5])
    routing.gates_TK[:, 0].sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad[0, :2].abs().min() > 0.1


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_bias_chooses_experts_and_leaves_their_gates_alone(score: str) -> None:
    logits, bias = _logits(), torch.linspace(-0.3, 0.3, 8)
    logits.requires_grad_()
    routing = route(logits, 3, True, score=score, bias_E=bias)
    scores = logits.softmax(-1) if score == "softmax" else 1 / (1 + (-logits).exp())
    moved = 0
    for token in range(len(logits)):
        best = sorted(range(8), key=lambda e: -float(scores[token, e].detach() + bias[e]))[:3]
        assert routing.experts_TK[token].tolist() == best
        torch.testing.assert_close(routing.gates_TK[token], scores[token, best] / scores[token, best].sum())
        moved += set(best) != set(logits[token].topk(3).indices.tolist())
    assert moved > 5
    weights = torch.randn(routing.gates_TK.shape, generator=torch.Generator().manual_seed(4))
    chosen = scores.gather(1, routing.experts_TK)
    expected = torch.autograd.grad((weights * chosen / chosen.sum(-1, keepdim=True)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad((weights * routing.gates_TK).sum(), logits), expected)


def test_balance_loss_of_sigmoid_scores_is_over_normalised_ones() -> None:
    logits = _logits()
    routing = route(logits, 3, True, score="sigmoid")
    counts = routing.selected_TE().sum(0)
    scores = 1 / (1 + (-logits.double()).exp())
    probability = (scores / scores.sum(-1, keepdim=True)).mean(0)
    expected = 8 * sum(int(counts[e]) / (3 * 40) * float(probability[e]) for e in range(8))
    assert load_balance_loss(routing, counts, torch.tensor(40)).item() == pytest.approx(expected, rel=1e-6)


def test_the_bias_moves_towards_the_mean_load() -> None:
    bias = updated_bias(torch.tensor([0.5, 0.0, 0.0, -0.1]), torch.tensor([9, 3, 5, 3]), 0.01)
    torch.testing.assert_close(bias, torch.tensor([0.49, 0.01, 0.0, -0.09]))
    assert updated_bias(torch.zeros(3), torch.tensor([7, 7, 7]), 0.1).eq(0).all()
    assert updated_bias(torch.zeros(3), torch.zeros(3, dtype=torch.int64), 0.1).eq(0).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_bias_balances_a_skewed_stream(score: str) -> None:
    generator = torch.Generator().manual_seed(2)
    skew, bias, imbalances = torch.linspace(-1.5, 1.5, 8), torch.zeros(8), []
    for _ in range(300):
        logits = torch.randn(256, 8, generator=generator) + skew
        load = route(logits, 2, True, score=score, bias_E=bias).selected_TE().sum(0)
        imbalances.append(float(load.max() / load.float().mean()))
        bias = updated_bias(bias, load, 0.005)
    start, end = sum(imbalances[:10]) / 10, sum(imbalances[-50:]) / 50
    # 64 tokens an expert: chance alone makes the busiest one about 1.2 times the mean.
    assert start > 2.2 and end < 1.3, (start, end)


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


def _mome(shared: int, renormalize: bool = True, **router: Any) -> LocalMoME:
    spec = RouterSpec(renormalize=renormalize, **router)
    module = LocalMoME(16, 6, 2, shared_experts=shared, bottleneck=3, router=spec)
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
        down, down_bias, up, up_bias = (part[n] for part in stack.weights())
        return up @ F.gelu(down @ h + down_bias) + up_bias

    output = module(hidden)
    for token, result in zip(hidden.flatten(0, 1), output.flatten(0, 1), strict=True):
        gates = (module.router.get_parameter("weight") @ token).softmax(0)
        best = gates.topk(2)
        weights = best.values / best.values.sum() if renormalize else best.values
        expected = sum(w * expert(module.routed, int(n), token) for w, n in zip(weights, best.indices, strict=True))
        for n in range(shared):
            assert module.shared is not None
            expected = expected + expert(module.shared, n, token)
        torch.testing.assert_close(result, expected)


def test_local_mome_routes_by_its_score_and_bias() -> None:
    module = _mome(0, score="sigmoid", bias_rate=0.001)
    assert module.router.bias is not None and "router_bias" in module.state_dict()
    assert "router_bias" not in _mome(0).state_dict()
    module.router.bias.copy_(torch.tensor([0.0, 0, 0, 0, 5, 5]))
    hidden = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    scores = torch.sigmoid(hidden @ module.router.get_parameter("weight").t())
    gates = torch.zeros(9, 6)
    gates[:, 4:] = scores[:, 4:] / scores[:, 4:].sum(-1, keepdim=True)
    torch.testing.assert_close(module(hidden), dense_experts(hidden, module.routed.weights(), gates))


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    module = _mome(1)
    hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([module(token[None]) for token in hidden])
    # Another number of rows is another order of sums: some roundings of 6e-8 of values of about one.
    torch.testing.assert_close(module(hidden), alone, rtol=1e-6, atol=1e-6)


def test_an_untrained_module_adds_nothing() -> None:
    module = LocalMoME(16, 6, 2, 1, 3)
    module.initialize("mome.0", seed=0)
    assert module(torch.randn(4, 16)).eq(0).all()
    assert module.router.get_parameter("weight").std().item() == pytest.approx(0.02, rel=0.3)


def test_initial_values_depend_on_name_and_seed_only() -> None:
    first = initial_value("mome.1.routed.4.down_weight", (3, 16), 5, "uniform")
    assert first.equal(initial_value("mome.1.routed.4.down_weight", (3, 16), 5, "uniform"))
    assert not first.equal(initial_value("mome.1.routed.5.down_weight", (3, 16), 5, "uniform"))
    assert not first.equal(initial_value("mome.1.routed.4.down_weight", (3, 16), 6, "uniform"))


def test_statistics_add_up_by_view_until_taken() -> None:
    statistics = RoutingStatistics()
    asked_TK = torch.tensor([[0, 1], [0, 2], [1, 2], *[[0, 1]] * 5])  # the last five tokens are dead
    kept_TK = torch.ones_like(asked_TK, dtype=torch.bool)
    kept_TK[1, 1] = False
    for views, kept in (([("asr(4)", [2]), ("vsr(2)", [1])], kept_TK), ([("asr(4)", [3])], None)):
        load, context = PassLoad(tuple(view for view, _ in views), None), TokenContext.of(views)
        load.put(1, context, 3, 2 - asked_TK, kept)
        load.put(0, context, 3, asked_TK, kept)
        load.reduce()
        statistics.expect(load)
    assert statistics.take() == {} and statistics.step_load == {}, "nothing has been read yet"
    statistics.settle()
    taken = statistics.take()
    assert taken["asr(4)"].tolist() == [[4, 3, 3, 0, 0, 1, 5, 10], [3, 3, 4, 1, 0, 0, 5, 10]]
    assert taken["vsr(2)"].tolist() == [[0, 1, 1, 0, 0, 0, 1, 6], [1, 1, 0, 0, 0, 0, 1, 6]]
    assert statistics.take() == {}
    step_load = {view: load_LE.tolist() for view, load_LE in statistics.step_load.items()}
    assert step_load == {"asr(4)": [[4, 3, 3], [3, 3, 4]], "vsr(2)": [[0, 1, 1], [1, 1, 0]]}
    packed = torch.stack([taken["asr(4)"], taken["vsr(2)"], torch.zeros(2, 8, dtype=torch.int64)])
    counts = RoutingCounts(("asr(4)", "vsr(2)", "vsr(5)"), packed[:, :1])
    assert (counts + counts).record() == {
        "tokens": 12,
        "positions": 32,
        "asked": [[8, 8, 8]],
        "dropped": [[0, 0, 2]],
    }
    assert list(counts.by_view()) == ["asr(4)", "vsr(2)"]
    assert counts.by_view()["asr(4)"]["dropped"] == [[0, 0, 1]]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_is_not_counted_twice(use_reentrant: bool) -> None:
    load, passes = PassLoad(("asr(4)",), None), []
    context = TokenContext.of([("asr(4)", [2])], multiple=1)

    def layer(x: torch.Tensor) -> torch.Tensor:
        passes.append(load.counting)
        if load.counting:
            load.put(0, context, 2, torch.tensor([[0], [0]]))
        return x.sin()

    output = checkpoint(layer, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant)
    load.reduce()
    output.sum().backward()
    assert passes == [True, False]
    assert load.of(0).tolist() == [[2, 0, 0, 0, 2, 2]]


def test_padding_selects_no_expert() -> None:
    routing = route(_logits(4, 3), 1, True, torch.tensor([True, True, True, False]))
    assert routing.selected_TE().sum(dim=1).tolist() == [1, 1, 1, 0]
