"""Routers of the registry in closed form: numbers that follow from their equations, limits in which they are others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mome_dist.config import load_config
from mome_dist.config.derived import router_of
from mome_dist.errors import UserError
from mome_dist.moe.balance import batch_sums
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.routers.base import Router
from mome_dist.moe.routing import entropy, route
from mome_dist.token_context import Modality, TokenContext
from tests.closed_routers import EXPERTS, HIDDEN, build, experts_used, normal


def _context(kinds: str) -> TokenContext:
    """One sequence of avsr(4,2), of audio (a), video (v) and text (t)."""
    names = {"a": Modality.AUDIO, "v": Modality.VIDEO, "t": Modality.TEXT}
    return TokenContext.of([("avsr(4,2)", [len(kinds)])], [names[kind] for kind in kinds], multiple=1)


def _batch_loss(router: Router, logits_TE: Tensor, context: TokenContext) -> Tensor:
    """The router's loss of a batch of one view."""
    routing = router.route(logits_TE, context)
    return router.batch_loss(*batch_sums([routing.restricted_to(context.members_VN[0].bool())]))


# -- top_p


@pytest.mark.parametrize(("p", "used"), [(0.1, 3), (0.4, 10), (0.49, 12), (0.51, 13), (1.0, 24)])
def test_top_p_of_even_probabilities_uses_the_floor_of_p_n_and_one_more(p: float, used: int) -> None:
    router = build("top_p", EXPERTS, "mome.renormalize=false", p=p)
    assert experts_used(router.route(torch.zeros(2, EXPERTS), None)).tolist() == [used, used]


def test_top_p_uses_one_expert_where_that_is_certain_and_more_the_less_certain_it_is() -> None:
    router = build("top_p", EXPERTS, "mome.renormalize=false", p=0.4)
    certain_TE = 50 * torch.eye(EXPERTS)
    assert experts_used(router.route(certain_TE, None)).eq(1).all()
    direction_E = normal(1, EXPERTS)
    used_T = experts_used(router.route(torch.cat([direction_E / t for t in (0.2, 0.5, 1, 2, 4, 8)]), None))
    assert used_T.tolist() == sorted(used_T.tolist()) and used_T[0] < used_T[-1]


def test_top_p_uses_the_least_number_of_experts_that_exceed_p_and_their_probabilities_as_gates() -> None:
    logits_TE = 2 * normal(50, EXPERTS)
    before_T = torch.zeros(50, dtype=torch.long)
    for p in (0.2, 0.5, 0.9):
        routing = build("top_p", EXPERTS, "mome.renormalize=false", p=p).route(logits_TE, None)
        gates_TE, used_T = routing.gates_TE(), experts_used(routing)
        for probs_E, gates_E, used in zip(logits_TE.softmax(dim=1), gates_TE, used_T.tolist(), strict=True):
            best = probs_E.sort(descending=True).values.double()
            assert best[:used].sum() > p >= best[: used - 1].sum()
            assert torch.equal(gates_E[gates_E > 0].sort().values, probs_E.sort().values[-used:])
        assert (used_T >= before_T).all()
        before_T = used_T


def test_top_p_uses_no_more_than_top_k_and_has_the_mean_entropy_for_a_loss() -> None:
    router = build("top_p", 4, "mome.renormalize=false", p=0.4)
    routing = router.route(torch.zeros(3, EXPERTS), None)
    assert experts_used(routing).eq(4).all()
    (loss,) = router.losses(routing)
    assert loss.coefficient == 1e-4
    torch.testing.assert_close(loss.values_T, torch.full((3,), math.log(EXPERTS)))


# -- null_experts


def test_without_null_experts_the_choice_is_that_of_the_k_best_bit_for_bit() -> None:
    logits_TE, router = normal(40, EXPERTS), build("null_experts", 4, nulls=0)
    mine, plain = router.route(logits_TE, None), route(logits_TE, 4, renormalize=True)
    assert torch.equal(mine.experts_TK, plain.experts_TK) and torch.equal(mine.gates_TK, plain.gates_TK)
    assert torch.equal(mine.probs_TE, plain.probs_TE)
    assert _batch_loss(router, logits_TE, _context("a" * 40)) == 0


def test_random_scores_use_four_of_eight_choices_and_rarely_none() -> None:
    router, tokens = build("null_experts", 8, nulls=24), 40_000
    routing = router.route(normal(tokens, 48), None)
    used_T = experts_used(routing)
    none = math.comb(24, 8) / math.comb(48, 8)  # 0.19 %
    # Five standard errors; the number of real experts is hypergeometric.
    deviation = math.sqrt(8 * 0.25 * 40 / 47)
    assert abs(float(used_T.float().mean()) - 4.0) < 5 * deviation / math.sqrt(tokens)
    assert abs(float((used_T == 0).float().mean()) - none) < 5 * math.sqrt(none / tokens)
    assert router.mean_top_k == 4
    sums_T = routing.gates_TE().sum(dim=1)
    torch.testing.assert_close(sums_T, (used_T > 0).float())


def test_a_token_of_null_experts_alone_has_gates_and_gradients_of_zero() -> None:
    router = build("null_experts", 2, nulls=3)
    logits_TE = torch.zeros(1, EXPERTS + 3)
    logits_TE[0, -2:] = 5
    logits_TE.requires_grad_()
    routing = router.route(logits_TE, None)
    assert not routing.gates_TK.any() and not routing.selected_TE().any()
    (gradient,) = torch.autograd.grad(routing.gates_TK.sum(), logits_TE)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_both_parts_of_the_null_balance_are_the_published_loss_where_loads_are_even() -> None:
    """Where probabilities are even and half of the choices are null, (E + M) (sum of f P) is 1, and the nulls' part is
    a half of it."""
    router = build("null_experts", 8, nulls=24, null_loss=1.0)
    logits_TE = 1e-4 * normal(64, 48)
    routing = router.route(logits_TE, None)
    share = float((~routing.chosen_TK).float().mean())
    loss = _batch_loss(router, logits_TE, _context("a" * 64))
    torch.testing.assert_close(float(loss), 48 * (share / 24) * 0.5, rtol=1e-3, atol=0)


# -- cosine


def test_cosines_do_not_know_how_long_a_token_is() -> None:
    router, hidden_TH = build("cosine", 4), normal(20, HIDDEN)
    one, other = (router(scale * hidden_TH, None) for scale in (1, 37))
    torch.testing.assert_close(one.logits_TE, other.logits_TE)
    assert one.logits_TE.abs().max() <= 1 / 0.3 + 1e-5


@torch.no_grad()
def test_cosine_probabilities_in_closed_form() -> None:
    router = build("cosine", 4, width=EXPERTS, temperature=0.5)
    router.projection.copy_(torch.eye(HIDDEN))
    router.directions.copy_(torch.eye(EXPERTS))
    hidden_1H = 9 * torch.eye(HIDDEN)[:1]
    orthogonal = router(hidden_1H, None).probs_TE[0, 0]
    torch.testing.assert_close(orthogonal, torch.tensor(math.e**2 / (math.e**2 + 23)))
    assert round(float(orthogonal), 3) == 0.243
    router.directions[1:] = -router.directions[:1]
    assert round(float(router(hidden_1H, None).probs_TE[0, 0]), 3) == 0.704
    router.scale_change.fill_(99.0)
    torch.testing.assert_close(router(hidden_1H, None).logits_TE[0, 0], torch.tensor(100.0))


# -- random, hash


def test_random_experts_have_even_gates_and_nothing_to_train() -> None:
    router = build("random", 4)
    assert not list(router.parameters()) and [state.name for state in router.states()] == ["map"]
    routing = router(normal(2000, HIDDEN), None)
    assert routing.gates_TK.eq(0.25).all() and experts_used(routing).eq(4).all()
    assert routing.selected_TE().any(dim=0).all()


@pytest.mark.parametrize(("by", "groups"), [("rate", 4), ("task", 3), ("modality", 3)])
def test_hashed_experts_are_those_of_a_group_in_every_layer(by: str, groups: int) -> None:
    router, other = (build("hash", 4, by=by) for _ in range(2))
    other.initialize("mome.7", 99)
    views = ("asr(4)", "asr(16)", "vsr(2)", "avsr(4,2)")
    spoken = {"asr": "aat", "vsr": "vvt", "avsr": "avt"}
    kinds = {"a": Modality.AUDIO, "v": Modality.VIDEO, "t": Modality.TEXT}
    modality = [kinds[kind] for view in views for kind in spoken[view.partition("(")[0]]]
    tokens = TokenContext.of([(view, [3]) for view in views], modality, multiple=1)
    hidden_TH = normal(tokens.tokens, HIDDEN)
    routing = router(hidden_TH, tokens)
    assert torch.equal(routing.experts_TK, other(-hidden_TH, tokens).experts_TK)
    assert len({tuple(row) for row in routing.experts_TK.tolist()}) == groups
    assert all(len(set(row)) == 4 for row in routing.experts_TK.tolist())
    assert not list(router.tensors())


# -- groups


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [4, 12])
def test_other_groups_experts_have_no_probability_and_no_gradient(score: str, top_k: int) -> None:
    router = build("groups", top_k, f"mome.score={score}", "mome.renormalize=false")
    tokens = _context("aaavvttt")
    routing = router(normal(8, HIDDEN), tokens)
    own_TE = torch.stack([torch.arange(EXPERTS) % 3 == "atv".index(kind) for kind in "aaavvttt"])
    assert not routing.probs_TE[~own_TE].any() and not routing.gates_TE()[~own_TE].any()
    assert not (routing.selected_TE() & ~own_TE).any()
    assert experts_used(routing).eq(min(top_k, 8)).all()  # of eight experts
    audio = routing.restricted_to(torch.tensor([kind == "a" for kind in "aaavvttt"]))
    (audio.gates_TK.sum() + audio.balance_sums(audio.valid_T[None].float(), True).square().sum()).backward()
    moved_E = router.weight.grad.any(dim=1)
    assert not moved_E[torch.arange(EXPERTS) % 3 != 0].any() and moved_E[::3].any()


def test_visible_experts_of_masks_are_so_many_and_may_be_shared() -> None:
    router = build("groups", 2, by="rate", visible=16)
    assert router.visible_GE.sum(dim=1).tolist() == [16] * 4
    assert (router.visible_GE.sum(dim=0) > 1).any()
    everything = build("groups", 2, by="rate", visible=EXPERTS)
    hidden_TH, tokens = normal(6, HIDDEN), _context("aavvtt")
    plain = route(everything.logits(hidden_TH, tokens), 2, renormalize=True)
    assert torch.equal(everything(hidden_TH, tokens).gates_TE(), plain.gates_TE())


# -- limoe


@pytest.mark.parametrize(
    ("logits", "local", "lack"),
    [
        (torch.zeros(48, EXPERTS), math.log(24), 0.0),
        (99 * torch.eye(EXPERTS).repeat(2, 1), 0.0, 0.0),
        (99 * torch.eye(EXPERTS)[:1].repeat(48, 1), 0.0, math.log(24)),
    ],
    ids=["even", "one each", "collapsed"],
)
def test_limoe_entropies_in_closed_form(logits: Tensor, local: float, lack: float) -> None:
    assert round(math.log(24), 3) == 3.178
    tokens = _context("a" * 24 + "v" * 24)
    for name, expected in (("local_loss", local), ("global_loss", lack)):
        other = "global_loss" if name == "local_loss" else "local_loss"
        router = build("limoe", 4, least_experts=24, **{name: 1.0, other: 0.0})
        loss = float(_batch_loss(router, logits, tokens))
        assert loss == pytest.approx(2 * expected, abs=1e-5)  # of two modalities; there is no text


def test_limoe_asks_for_no_more_experts_than_it_is_told() -> None:
    two_TE = 99 * torch.eye(EXPERTS)[:2].repeat(12, 1)
    for least, lack in ((2, 0.0), (4, math.log(2))):
        router = build("limoe", 4, least_experts=least, local_loss=0, global_loss=1)
        assert float(_batch_loss(router, two_TE, _context("a" * 24))) == pytest.approx(lack, abs=1e-5)
    assert float(_batch_loss(build("limoe", 4, local_loss=0, global_loss=1), two_TE, _context("a" * 24))) > 0.6


# -- smar


def test_smar_in_closed_form() -> None:
    tokens = _context("aavvtt")
    router = build("smar", 4)
    alike = normal(1, EXPERTS).repeat(6, 1)
    assert float(_batch_loss(router, alike, tokens)) == pytest.approx(0.01 * 0.1, rel=1e-5)
    apart = torch.zeros(6, EXPERTS)
    apart[2:4] = 0.35 * normal(1, EXPERTS)
    logs = [apart[row].log_softmax(dim=0) for row in (0, 2)]
    divergence = float(((logs[0].exp() - logs[1].exp()) * (logs[0] - logs[1])).sum())
    assert 0.1 < divergence < 1
    apart.requires_grad_()
    inside = _batch_loss(router, apart, tokens)
    (gradient,) = torch.autograd.grad(inside, apart)
    assert inside == 0 and not gradient.any()
    aligning = build("smar", 4, least=0, most=0)
    assert _batch_loss(aligning, apart, tokens).item() == pytest.approx(0.01 * divergence, rel=1e-4)
    disjoint = torch.full((6, EXPERTS), -99.0)
    disjoint[:2, 0] = disjoint[2:4, 1] = 99.0
    far = 2 * (1 - 1e-6) * math.log(1e6)  # probabilities below 1e-6 count as that
    assert float(_batch_loss(router, disjoint, tokens)) == pytest.approx(0.01 * (far - 1), rel=1e-4)


def test_smar_is_a_matter_of_two_groups() -> None:
    assert float(_batch_loss(build("smar", 4), normal(6, EXPERTS), _context("aaaatt"))) == 0


def test_smar_aligns_rates_over_views() -> None:
    router, views = build("smar", 4, by="rate", least=0, most=0), ("asr(4)", "asr(16)")
    logits = {view: normal(1, EXPERTS, seed=seed).repeat(5, 1) for seed, view in enumerate(views)}
    routings = []
    for view in views:
        tokens = TokenContext.of([(view, [5])], multiple=1)
        routings.append(router.route(logits[view], tokens).restricted_to(torch.ones(5, dtype=torch.bool)))
    logs = [logits[view][0].log_softmax(dim=0) for view in views]
    divergence = float(((logs[0].exp() - logs[1].exp()) * (logs[0] - logs[1])).sum())
    assert float(router.batch_loss(*batch_sums(routings))) == pytest.approx(0.01 * divergence, rel=1e-5)


# -- autonomy


def _autonomy(top_k: int, renormalize: bool = False) -> Any:  # a LocalMoME, with the parts that its experts have
    sizes = [f"mome.routed_experts={EXPERTS}", f"mome.top_k={top_k}", f"mome.renormalize={renormalize}"]
    module: Any = LocalMoME(HIDDEN, EXPERTS, top_k, 0, 3, router_of(load_config(["mome/router=autonomy", *sizes])))
    module.initialize("mome.0", 3)
    with torch.no_grad():
        module.routed.up_weight.normal_(generator=torch.Generator().manual_seed(1))
    return module


def test_an_expert_is_chosen_by_the_norm_of_its_answer() -> None:
    module, hidden_TH = _autonomy(4), normal(10, HIDDEN)
    norms_TE = torch.stack([(hidden_TH @ down_bH.t()).norm(dim=1) for down_bH in module.routed.down_weight], dim=1)
    routing = module.router(hidden_TH, None)
    torch.testing.assert_close(routing.logits_TE, norms_TE)
    torch.testing.assert_close(routing.gates_TK, norms_TE.softmax(dim=1).topk(4).values)
    with torch.no_grad():
        module.routed.down_weight[5] *= 3
    torch.testing.assert_close(module.router(hidden_TH, None).logits_TE[:, 5], 3 * norms_TE[:, 5])


@torch.no_grad()
def test_equal_down_projections_and_a_zero_answer_are_even() -> None:
    module = _autonomy(4)
    module.routed.down_weight.copy_(module.routed.down_weight[:1].expand_as(module.routed.down_weight))
    torch.testing.assert_close(module.router(normal(3, HIDDEN), None).probs_TE, torch.full((3, EXPERTS), 1 / EXPERTS))


def test_all_experts_are_the_dense_mixture_and_zero_has_a_gradient() -> None:
    module, hidden_TH = _autonomy(EXPERTS), normal(6, HIDDEN)
    weights = [part.unbind(0) for part in module.routed.weights()]
    outputs_ETH = torch.stack([module.routed.form.one(hidden_TH, *parts) for parts in zip(*weights, strict=True)])
    probs_TE = module.router(hidden_TH, None).probs_TE
    torch.testing.assert_close(module(hidden_TH), torch.einsum("te,eth->th", probs_TE, outputs_ETH))
    (gradient,) = torch.autograd.grad(
        module.router(0 * hidden_TH, None).probs_TE[:, 0].sum(), module.routed.down_weight
    )
    assert gradient.isfinite().all()


# -- what all have


def test_entropy_of_certainty_and_of_none() -> None:
    found_T = entropy(torch.stack([torch.zeros(EXPERTS), 1e4 * torch.eye(EXPERTS)[0]]))
    torch.testing.assert_close(found_T, torch.tensor([math.log(EXPERTS), 0.0]))


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        (
            "top_p",
            "mome.renormalize=true",
            r"mome\.renormalize=true does not go with mome\.router\.name=top_p: set false",
        ),
        ("top_p", "mome.router.p=1.5", r"mome\.router\.p=1\.5: a probability is above 0 and at most 1"),
        ("null_experts", "mome.router.nulls=-1", r"mome\.router\.nulls=-1: set 0 or more"),
        ("null_experts", "mome.score=sigmoid", r"mome\.score=sigmoid does not go with mome\.router\.name=null_experts"),
        ("cosine", "mome.router.temperature=0", r"mome\.router\.temperature=0\.0: set 0\.01 or more"),
        ("cosine", "mome.router.width=0", r"mome\.router\.width=0: set 1 or more, or null"),
        ("groups", "mome.router.visible=99", r"mome\.router\.visible=99: set 1 to mome\.routed_experts=24, or null"),
        ("groups", "mome.bias_rate=0.1", r"mome\.bias_rate=0\.1 does not go with mome\.router\.name=groups"),
        ("limoe", "mome.router.least_experts=25", r"mome\.router\.least_experts=25: set 1 to mome\.routed_experts=24"),
        ("smar", "mome.router.least=2", r"mome\.router\.least=2\.0: set 0 to most=1\.0"),
        ("smar", "mome.router.by=clip", r"mome\.router\.by=.*clip"),
    ],
)
def test_what_a_router_does_not_have_is_refused_by_name(name: str, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, 4, *(["mome.renormalize=false"] if name == "top_p" and "renorm" not in setting else []), setting)
