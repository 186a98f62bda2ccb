"""Routers that learn from experts that they do not choose, or draw some: beside autograd of sums written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.errors import UserError
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.routers.base import Router
from mome_dist.moe.routing import Routing, route
from mome_dist.token_context import TokenContext
from tests.closed_routers import EXPERTS, HIDDEN, build, experts_used, normal

UNDIVIDED = "mome.renormalize=false"
TOKENS = 30


def _module(router: Router) -> Any:  # a LocalMoME, with the parts that its experts have
    """A module without shared experts whose experts give something, and routers tell tokens apart."""
    module: Any = LocalMoME(HIDDEN, EXPERTS, router.top_k, 0, 3, router.spec)
    module.initialize("mome.0", 3)
    with torch.no_grad():
        module.routed.up_weight.normal_(generator=torch.Generator().manual_seed(1))
        module.router.weight.mul_(20)
    return module


def _outputs(module: Any, hidden_TH: Tensor) -> Tensor:
    """[E, T, H], what every expert says."""
    weights = [part.unbind(0) for part in module.routed.weights()]
    return torch.stack([module.routed.form.one(hidden_TH, *parts) for parts in zip(*weights, strict=True)])


def _gradients(module: Any, output_TH: Tensor) -> list[Tensor]:
    """Compute the gradients of the router's map, then of the experts."""
    weights = [module.router.weight, *module.routed.weights()]
    return list(torch.autograd.grad((output_TH * normal(*output_TH.shape, seed=9)).sum(), weights, retain_graph=True))


# -- the soft mixture


def test_all_experts_undivided_are_the_soft_mixture() -> None:
    """`mome.top_k` of all experts and `mome.renormalize=false`: the router of docs/routers.md that needs no code."""
    module, hidden_TH = _module(build("top_k", EXPERTS, UNDIVIDED)), normal(TOKENS, HIDDEN)
    probs_TE = F.linear(hidden_TH, module.router.weight).softmax(dim=1)
    soft_TH = torch.einsum("te,eth->th", probs_TE, _outputs(module, hidden_TH))
    output_TH = module(hidden_TH)
    torch.testing.assert_close(output_TH, soft_TH)
    assert torch.equal(module.last_routing.gates_TE(), module.last_routing.probs_TE)
    for mine, theirs in zip(_gradients(module, output_TH), _gradients(module, soft_TH), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(hidden_TH), soft_TH.detach(), rtol=1e-5, atol=1e-5)


# -- dense_gradient


@pytest.mark.parametrize(
    "more", [(), (UNDIVIDED,), ("mome.score=sigmoid", "mome.bias_rate=0.1")], ids=["divided", "undivided", "sigmoid"]
)
def test_a_dense_gradient_changes_nothing_but_the_routers_gradient(more: tuple[str, ...]) -> None:
    hidden_TH = normal(TOKENS, HIDDEN)
    plain, dense = (_module(build(name, 4, *more)) for name in ("top_k", "dense_gradient"))
    outputs = [module(hidden_TH) for module in (plain, dense)]
    assert torch.equal(*outputs)
    for field in ("experts_TK", "gates_TK", "probs_TE"):
        assert torch.equal(getattr(plain.last_routing, field), getattr(dense.last_routing, field))
    assert torch.equal(plain.last_routing.selected_TE(), dense.last_routing.selected_TE())
    (of_router, *of_experts), (other, *same) = map(_gradients, (plain, dense), outputs)
    assert all(map(torch.equal, of_experts, same))
    assert (of_router - other).norm() > 0.1 * of_router.norm()
    with torch.no_grad():
        assert torch.equal(*(module.eval()(hidden_TH) for module in (plain, dense)))


@pytest.mark.parametrize("divided", [False, True])
def test_a_dense_gradient_is_that_of_the_soft_mixture(divided: bool) -> None:
    """Published: of P where gates are not divided by their sum S; else of P / S, S a constant to other experts."""
    module = _module(build("dense_gradient", 4, f"mome.renormalize={divided}"))
    hidden_TH = normal(TOKENS, HIDDEN)
    mine = _gradients(module, module(hidden_TH))[0]
    weights_TE = F.linear(hidden_TH, module.router.weight).softmax(dim=1)
    if divided:
        best_TE = module.last_routing.selected_TE()
        sums_T1 = (weights_TE * best_TE).sum(dim=1, keepdim=True)
        weights_TE = torch.where(best_TE, weights_TE / sums_T1, weights_TE / sums_T1.detach())
    soft_TH = torch.einsum("te,eth->th", weights_TE, _outputs(module, hidden_TH).detach())
    torch.testing.assert_close(mine, _gradients_of_router(module, soft_TH), rtol=1e-4, atol=1e-5)


def _gradients_of_router(module: Any, output_TH: Tensor) -> Tensor:
    loss = (output_TH * normal(*output_TH.shape, seed=9)).sum()
    return torch.autograd.grad(loss, module.router.weight)[0]


# -- gw_moe


def test_a_workspace_is_plain_at_one_and_dense_at_zero() -> None:
    logits_TE = torch.cat([normal(TOKENS, EXPERTS), torch.zeros(1, EXPERTS)])
    for divided in (True, False):
        plain = route(logits_TE, 4, divided)
        never, always = (build("gw_moe", 4, f"mome.renormalize={divided}", threshold=t) for t in (1, 0))
        assert torch.equal(never.route(logits_TE, None).gates_TE(), plain.gates_TE())
        assert torch.equal(always.route(logits_TE, None).gates_TE(), plain.probs_TE)
        assert (
            experts_used(never.route(logits_TE, None)).eq(4).all()
            and experts_used(always.route(logits_TE, None)).eq(EXPERTS).all()
        )
        for router in (never, always):
            there = router.eval().route(logits_TE, None)
            assert torch.equal(there.experts_TK, plain.experts_TK) and torch.equal(there.gates_TK, plain.gates_TK)


def test_a_workspace_takes_tokens_in_above_the_threshold() -> None:
    """Even probabilities over m experts have the entropy ln m."""
    router = build("gw_moe", 4, threshold=math.log(12) / math.log(EXPERTS))
    logits_TE = torch.where(torch.arange(EXPERTS) < torch.tensor([[4], [11], [13], [24]]), 0.0, -99.0)
    routing = router.route(logits_TE, None)
    assert experts_used(routing).tolist() == [4, 4, EXPERTS, EXPERTS]
    torch.testing.assert_close(routing.gates_TE()[2, :13], torch.full((13,), 1 / 13))


# -- grin


def _draws(tokens: int) -> TokenContext:
    return TokenContext.of([("asr(4)", [tokens])], multiple=1, draws=[7])


def _grin(logits_E: Tensor, tokens: int, **settings: Any) -> Routing:
    return build("grin", 2, UNDIVIDED, **settings).route(logits_E.expand(tokens, -1), _draws(tokens))


def test_grin_draws_two_experts_with_their_probabilities() -> None:
    """The first with P, the second with P among the others, where no expert is too far from the best."""
    logits_E, tokens = torch.full((EXPERTS,), -50.0), 20_000
    logits_E[:4] = torch.tensor([3.0, 2.5, 2.0, 1.0])
    routing = _grin(logits_E, tokens, epsilon=0.4)  # up to 0.8 of the best: 0.6 and more
    probs_E = logits_E.softmax(dim=0)
    first_E, second_E = (torch.bincount(each, minlength=EXPERTS) / tokens for each in routing.experts_TK.unbind(1))
    assert (routing.experts_TK[:, 0] != routing.experts_TK[:, 1]).all()
    bound = 5 * math.sqrt(0.25 / tokens)
    torch.testing.assert_close(first_E, probs_E, atol=bound, rtol=0)
    expected_E = torch.stack(
        [probs_E[first] * probs_E.where(torch.arange(EXPERTS) != first, 0) / (1 - probs_E[first]) for first in range(4)]
    )
    torch.testing.assert_close(second_E, expected_E.sum(dim=0), atol=bound, rtol=0)
    # A third of the gate with 3/4, unless it is the best one that is left.
    drawn = routing.experts_TK[:, 0] == 1
    gates_T = routing.gates_TK[drawn, 0]
    thirds = torch.isclose(gates_T, probs_E[1] / 3)
    assert (thirds | torch.isclose(gates_T, probs_E[1])).all()
    assert abs(float(thirds.float().mean()) - 0.75) < 5 * math.sqrt(3 / 16 / int(drawn.sum()))
    assert torch.allclose(routing.gates_TK[routing.experts_TK[:, 0] == 0, 0], probs_E[0])


def test_grin_masks_experts_that_are_far_from_the_best() -> None:
    logits_E = torch.full((EXPERTS,), -1.0)
    logits_E[:4] = torch.tensor([2.0, 1.99, 1.97, 1.0])
    routing = _grin(logits_E, 4000)
    torch.testing.assert_close(routing.experts_TK[:, 0].unique(), torch.arange(3))  # 2 % below the best, no further
    second_of_0 = routing.experts_TK[routing.experts_TK[:, 0] == 0, 1]
    assert set(second_of_0.tolist()) == {1, 2}
    there = build("grin", 2, UNDIVIDED).eval().route(logits_E[None], None)
    assert there.experts_TK.tolist() == [[0, 1]]
    expected = [logits_E[:3].softmax(dim=0)[0], logits_E[1:3].softmax(dim=0)[0]]
    torch.testing.assert_close(there.gates_TK[0], torch.stack(expected))


def test_grins_gradient_is_that_of_whole_gates() -> None:
    logits_TE = normal(TOKENS, EXPERTS).requires_grad_()
    routing = build("grin", 2, UNDIVIDED, epsilon=9).route(logits_TE, _draws(TOKENS))
    first_T1, second_T1 = routing.experts_TK.split(1, dim=1)
    rest_TE = logits_TE.scatter(1, first_T1, -torch.inf).softmax(dim=1)
    whole_TK = torch.cat([logits_TE.softmax(dim=1).gather(1, first_T1), rest_TE.gather(1, second_T1)], dim=1)
    assert (routing.gates_TK < 0.9 * whole_TK).any()
    mine, theirs = (
        torch.autograd.grad((g * normal(TOKENS, 2)).sum(), logits_TE)[0] for g in (routing.gates_TK, whole_TK)
    )
    torch.testing.assert_close(mine, theirs)


def test_grin_has_two_experts() -> None:
    with pytest.raises(UserError, match=r"mome\.top_k=4 does not go with mome\.router\.name=grin: set 2"):
        build("grin", 4, UNDIVIDED)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("gw_moe", "mome.router.threshold=2", r"mome\.router\.threshold=2\.0: a share of the largest entropy"),
        ("gw_moe", "mome.dispatch=alltoall", r"mome\.dispatch=alltoall does not go with mome\.router\.name=gw_moe"),
        ("dense_gradient", "mome.dispatch=alltoall", r"mome\.dispatch=alltoall does not go with .*set auto or gather"),
        ("grin", "mome.router.epsilon=-1", r"mome\.router\.epsilon=-1\.0: set 0 or more"),
    ],
)
def test_what_they_do_not_have_is_refused_by_name(name: str, setting: str, message: str) -> None:
    undivided = () if name in ("gw_moe", "dense_gradient") else (UNDIVIDED,)
    with pytest.raises(UserError, match=message):
        build(name, 2, *undivided, setting)
