"""Routers of two steps, mixtures of routers and groups of experts, in closed form: limits in which they are MoME's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mome_dist.config import load_config
from mome_dist.config.derived import router_of
from mome_dist.config.values import check_values
from mome_dist.errors import UserError
from mome_dist.moe.balance import batch_sums, router_z_loss
from mome_dist.moe.routers.build import build_router
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.moe.routing import Routing

HIDDEN, EXPERTS = 24, 24


def _router(name: str, top_k: int, *more: str, **settings: Any) -> Any:
    own = [f"mome.router.{key}={value}" for key, value in settings.items()]
    sizes = [f"mome.routed_experts={EXPERTS}", f"mome.top_k={top_k}"]
    config = load_config(["experiment=tiny", f"mome/router={name}", *sizes, *own, *more])
    check_values(config)
    router = build_router(router_of(config), HIDDEN, EXPERTS, top_k)
    router.initialize("mome.0", 3)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(20)
    return router


def _plain(weight_EH: Tensor, renormalize: bool = True) -> TopKRouter:
    router = TopKRouter(RouterSpec(renormalize=renormalize), HIDDEN, EXPERTS, 4)
    router.weight = torch.nn.Parameter(weight_EH.detach().clone())
    return router


def _hidden(tokens: int) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2))


def _assert_alike(one: Routing, other: Routing) -> None:
    assert torch.equal(one.experts_TK, other.experts_TK)
    for name in ("gates_TK", "probs_TE", "logits_TE"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)
    tokens = torch.tensor(len(one.gates_TK))
    torch.testing.assert_close(router_z_loss(one, tokens), router_z_loss(other, tokens))


# -- mixture_of_routers


def _parts(router: Any) -> dict[str, Tensor]:
    return {each.name: each.of(each.parameter.detach()) for each in router.trained()}


@torch.no_grad()
def test_equal_sub_routers_are_one_router() -> None:
    router, hidden_TH = _router("mixture_of_routers", 4, sub_routers=4), _hidden(50)
    parts = _parts(router)
    assert list(parts) == ["weight.0", "weight.1", "weight.2", "weight.3", "mixing"]
    for number in range(1, 4):
        parts[f"weight.{number}"].copy_(parts["weight.0"])
    _assert_alike(router(hidden_TH, None), _plain(parts["weight.0"])(hidden_TH, None))


@torch.no_grad()
def test_a_main_router_that_is_sure_is_the_sub_router_that_it_names() -> None:
    router, hidden_TH = _router("mixture_of_routers", 4), _hidden(50)
    parts, hidden_TH[:, 0] = _parts(router), 1.0
    parts["mixing"].zero_()
    parts["mixing"][1, 0] = 99
    _assert_alike(router(hidden_TH, None), _plain(parts["weight.1"])(hidden_TH, None))


def test_probabilities_are_the_mixture_of_softmaxes() -> None:
    router, hidden_TH = _router("mixture_of_routers", 4, "mome.renormalize=false"), _hidden(50)
    parts = _parts(router)
    mixing_TS = (hidden_TH @ parts["mixing"].t()).softmax(dim=1)
    each = [(hidden_TH @ parts[f"weight.{number}"].t()).softmax(dim=1) for number in range(3)]
    expected_TE = torch.stack(
        [mixing_TS[:, number : number + 1] * probs_TE for number, probs_TE in enumerate(each)]
    ).sum(0)
    routing = router(hidden_TH, None)
    torch.testing.assert_close(routing.probs_TE, expected_TE)
    torch.testing.assert_close(routing.gates_TK, expected_TE.topk(4, dim=1).values)


# -- bilevel


@pytest.mark.parametrize("groups", [1, EXPERTS])
def test_one_level_without_a_choice_is_the_flat_router(groups: int) -> None:
    router, hidden_TH = _router("bilevel", 4, groups=groups), _hidden(50)
    assert router.rows.shape == (EXPERTS, HIDDEN)
    _assert_alike(router(hidden_TH, None), _plain(router.rows)(hidden_TH, None))


@pytest.mark.parametrize("groups", [4, 5, 23])
def test_gates_are_products_that_add_up_to_one(groups: int) -> None:
    router, hidden_TH = _router("bilevel", 4, "mome.renormalize=false", groups=groups), _hidden(50)
    of_groups_TG = (hidden_TH @ router.rows[:groups].t()).softmax(dim=1)
    logits_TE, expected_TE = hidden_TH @ router.rows[groups:].t(), torch.zeros(50, EXPERTS)
    sizes = torch.bincount(router.group_E).tolist()
    assert len(sizes) == groups and max(sizes) - min(sizes) <= 1
    for group, own in enumerate(torch.arange(EXPERTS).split(sizes)):
        expected_TE[:, own] = of_groups_TG[:, group : group + 1] * logits_TE[:, own].softmax(dim=1)
    routing = router(hidden_TH, None)
    torch.testing.assert_close(routing.probs_TE, expected_TE)
    torch.testing.assert_close(expected_TE.sum(dim=1), torch.ones(50))
    torch.testing.assert_close(routing.gates_TK, expected_TE.topk(4, dim=1).values)


@pytest.mark.parametrize("renormalize", ["true", "false"])
def test_the_best_expert_of_the_best_group_is_smiles(renormalize: str) -> None:
    router, hidden_TH = _router("bilevel", 2, f"mome.renormalize={renormalize}", groups=4, top_groups=1), _hidden(50)
    of_groups_TG = (hidden_TH @ router.rows[:4].t()).softmax(dim=1)
    best_T = of_groups_TG.argmax(dim=1)
    within_T6 = (hidden_TH @ router.rows[4:].t()).unflatten(1, (4, 6))[torch.arange(50), best_T].softmax(dim=1)
    routing, best = router(hidden_TH, None), within_T6.topk(2, dim=1)
    assert torch.equal(routing.experts_TK, best_T[:, None] * 6 + best.indices)
    products_TK = of_groups_TG.gather(1, best_T[:, None]) * best.values
    expected_TK = products_TK / products_TK.sum(dim=1, keepdim=True) if renormalize == "true" else products_TK
    torch.testing.assert_close(routing.gates_TK, expected_TK)


@pytest.mark.parametrize(("sure", "expected"), [(False, 1.0), (True, 4.0)])
def test_balance_of_groups_in_closed_form(sure: bool, expected: float) -> None:
    router = _router("bilevel", 4, groups=4, group_loss=0.5)
    logits_TE = torch.zeros(8, EXPERTS)
    if sure:
        logits_TE[:, :6] = 99
    routing = router.route(logits_TE, None).restricted_to(torch.ones(8, dtype=torch.bool))
    assert float(router.batch_loss(*batch_sums([routing]))) == pytest.approx(0.5 * expected, rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mome/router=mixture_of_routers mome.router.sub_routers=0", r"mome\.router\.sub_routers=0: set 1 or more"),
        ("mome/router=bilevel mome.router.groups=25", r"mome\.router\.groups=25: set 1 to mome\.routed_experts=24"),
        ("mome/router=bilevel mome.router.top_groups=5", r"mome\.router\.top_groups=5: set 1 to groups=4, or null"),
        ("mome/router=bilevel mome.router.top_groups=1 mome.top_k=8", r"may have 6 experts, less than mome\.top_k=8"),
        ("mome/router=bilevel mome.bias_rate=0.1", r"mome\.bias_rate=0\.1 does not go with mome\.router\.name=bilevel"),
    ],
)
def test_what_they_do_not_have_is_refused_by_name(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_values(load_config(["experiment=tiny", f"mome.routed_experts={EXPERTS}", *setting.split()]))
