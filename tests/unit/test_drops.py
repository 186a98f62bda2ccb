"""What full experts take and where the others go: shares in closed form, and the loop over pairs that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mome_dist.config import load_config
from mome_dist.config.derived import router_of
from mome_dist.config.values import check_learning, check_values
from mome_dist.errors import UserError
from mome_dist.moe.dispatch.drops import kept, rerouted, slots
from mome_dist.moe.routers.build import build_router
from mome_dist.moe.routers.registry import ROUTERS
from mome_dist.moe.routing import Routing, gates_again, route
from mome_dist.parallel.layout import Layout
from mome_dist.preflight import check_experts
from mome_dist.token_context import Modality, TokenContext

EXPERTS, TOP_K, TOKENS = 24, 4, 48
POLICIES = ("position", "probs", "reroute")


def _logits(tokens: int = TOKENS, common: float = 0.0, seed: int = 0) -> Tensor:
    """Draw logits of tokens that have so much in common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, EXPERTS, generator=generator) + common * torch.randn(EXPERTS, generator=generator)


def _taken(routing: Routing, capacity: int, policy: str, candidates: int | None = None) -> tuple[Tensor, Tensor]:
    kept_TK = kept(routing, capacity, policy)
    if policy != "reroute":
        return routing.experts_TK, kept_TK
    return rerouted(routing, kept_TK, capacity, candidates)


def _load(experts_TK: Tensor, taken_TK: Tensor) -> Tensor:
    return torch.bincount(experts_TK[taken_TK], minlength=EXPERTS)


@pytest.mark.parametrize(("factor", "dropped"), [(1.0, 0.8333), (2.0, 0.6667), (6.0, 0.0)])
def test_tokens_that_all_choose_the_same_experts_lose_what_has_no_slot(factor: float, dropped: float) -> None:
    routing = route(_logits(1).expand(TOKENS, -1), TOP_K, renormalize=True)
    capacity = slots(TOKENS, TOP_K, EXPERTS, factor, 1)
    for policy in POLICIES[:2]:
        share = 1 - float(kept(routing, capacity, policy).float().mean())
        assert share == pytest.approx(1 - min(factor * TOP_K / EXPERTS, 1)) == pytest.approx(dropped, abs=1e-4)
    # Equal tokens: the first ones are kept. And with room for all, rerouting finds it.
    assert kept(routing, capacity, "probs").equal(kept(routing, capacity, "position"))
    assert factor < 2 or _taken(routing, capacity, "reroute")[1].all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_no_expert_takes_more_than_it_has_slots(policy: str, factor: float) -> None:
    routing = route(_logits(common=2.0), TOP_K, renormalize=True)
    capacity = slots(TOKENS, TOP_K, EXPERTS, factor, 1)
    experts_TK, taken_TK = _taken(routing, capacity, policy)
    assert _load(experts_TK, taken_TK).max() <= capacity
    assert all(len(set(row)) == TOP_K for row in experts_TK.tolist()), "an expert is used once"
    assert taken_TK.sum() <= EXPERTS * capacity


@pytest.mark.parametrize("policy", POLICIES)
def test_slots_for_all_tokens_change_nothing(policy: str) -> None:
    routing = route(_logits(common=9.0), TOP_K, renormalize=True)
    capacity = slots(TOKENS, TOP_K, EXPERTS, EXPERTS / TOP_K, 1)
    experts_TK, taken_TK = _taken(routing, capacity, policy)
    assert capacity == TOKENS and taken_TK.all() and experts_TK.equal(routing.experts_TK)
    assert gates_again(routing, experts_TK, True, "softmax").equal(routing.gates_TK)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_rerouted_tokens_keep_their_k_experts_while_there_is_room(top_k: int) -> None:
    routing = route(_logits(1).expand(TOKENS, -1) + 1e-3 * _logits(seed=1), top_k, renormalize=False)
    capacity = -(-top_k * TOKENS // (EXPERTS - top_k + 1))
    assert _taken(routing, capacity, "reroute")[1].all()
    assert not _taken(routing, capacity, "probs")[1].all()


def test_the_last_token_may_find_room_in_one_expert_alone() -> None:
    """Three experts of two slots are enough for three tokens of two experts, but not in this order."""
    routing = route(torch.tensor([[3.0, 2, 1]] * 3), 2, renormalize=False)
    experts_TK, taken_TK = _taken(routing, 2, "reroute")
    assert taken_TK.tolist() == [[True, True], [True, True], [True, False]] and experts_TK[2, 0] == 2


@pytest.mark.parametrize("candidates", [None, 7])
@pytest.mark.parametrize("capacity", [1, 3, 8, 12])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_rerouting_is_the_loop_over_pairs(capacity: int, candidates: int | None, step: float) -> None:
    """With and without pairs that are equal, and padding."""
    logits_TE = _logits(common=1.0)
    logits_TE = (logits_TE / step).round() * step if step else logits_TE
    valid_T = torch.arange(TOKENS) % 5 != 2
    routing = route(logits_TE, TOP_K, True, valid_T)
    experts_TK, taken_TK = _taken(routing, capacity, "reroute", candidates)
    first_TK = kept(routing, capacity, "probs")
    assert (taken_TK & first_TK).equal(first_TK), "who asked first stays"
    expected = _loop(routing, first_TK, capacity, candidates)
    for token in range(TOKENS):
        assert set(experts_TK[token][taken_TK[token]].tolist()) == expected[token], token
    assert not taken_TK[~valid_T].any()


def _loop(routing: Routing, kept_TK: Tensor, capacity: int, candidates: int | None) -> list[set[int]]:
    probs = routing.probs_TE.tolist()
    asked = [set(row) for row in routing.experts_TK.tolist()]
    used = [{int(e) for e, k in zip(*row, strict=True) if k} for row in zip(routing.experts_TK, kept_TK, strict=True)]
    room = [capacity - sum(expert in each for each in used) for expert in range(EXPERTS)]
    assert routing.valid_T is not None
    pairs = []
    for token, valid in enumerate(routing.valid_T.tolist()):
        best = sorted(range(EXPERTS), key=lambda expert: (-probs[token][expert], expert))[:candidates]
        pairs += [(-probs[token][expert], token, expert) for expert in best if valid and expert not in asked[token]]
    for _, token, expert in sorted(pairs):
        if room[expert] and len(used[token]) < TOP_K:
            used[token].add(expert)
            room[expert] -= 1
    return used


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gates_of_other_experts_are_their_scores(score: str, renormalize: bool) -> None:
    logits_TE = _logits(common=2.0)
    routing = route(logits_TE, TOP_K, renormalize, score=score)
    assert gates_again(routing, routing.experts_TK, renormalize, score).equal(routing.gates_TK)
    experts_TK, _ = _taken(routing, 8, "reroute")
    assert not experts_TK.equal(routing.experts_TK)
    scores_TE = logits_TE.softmax(dim=1) if score == "softmax" else logits_TE.sigmoid()
    expected_TK = scores_TE.gather(1, experts_TK)
    if renormalize:
        expected_TK = expected_TK / expected_TK.sum(dim=1, keepdim=True)
    torch.testing.assert_close(gates_again(routing, experts_TK, renormalize, score), expected_TK)


@pytest.mark.parametrize("name", [name for name, kind in ROUTERS.items() if kind.settings.reroutes])
def test_routers_that_reroute_have_gates_of_their_logits(name: str) -> None:
    kind = ROUTERS[name].settings
    words = [f"mome/router={name}", f"mome.renormalize={kind.renormalizes[0]}", f"mome.score={kind.scores[0]}"]
    spec = router_of(load_config(["experiment=tiny", *words]))
    router = build_router(spec, EXPERTS, EXPERTS, TOP_K)
    router.initialize("mome.0", 3)
    view = str(spec.views[0])
    tokens = TokenContext.of([(view, [TOKENS])], [Modality.AUDIO] * TOKENS)
    routing = router(_logits(), tokens)
    assert routing.chosen_TK is None
    assert gates_again(routing, routing.experts_TK, spec.renormalize, spec.score).equal(routing.gates_TK)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("mome/router=random", r"reroute does not go with mome\.router\.name=random"),
        ("mome.eval_capacity_factor=1", r"of training alone.*mome\.eval_capacity_factor=1\.0: set that to null"),
        ("mome.capacity_factor=null", r"with mome\.capacity_factor=null none is ever full: set a factor such as 1\.0"),
        ("mome.dispatch=gather", r"no effect with mome\.dispatch=gather"),
        ("mome.reroute_candidates=0", r"mome\.reroute_candidates=0: must be at least 1"),
    ],
)
def test_rerouting_is_refused_by_name(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_values(load_config(["experiment=tiny", "mome.drop_policy=reroute", *words.split()]))


@pytest.mark.parametrize("words", ["mome.alltoall_nodes=3", "mome.alltoall_nodes=2 mome.dispatch=gather"])
def test_nodes_that_ranks_do_not_divide_into_are_refused(words: str) -> None:
    layout = Layout.for_world(4, ep=4)
    check_experts(load_config(["experiment=tiny", "mome.alltoall_nodes=2"]), layout)
    with pytest.raises(UserError, match=r"mome\.alltoall_nodes=\d .* parallel\.ep=4.*: set mome\.alltoall_nodes=1"):
        check_experts(load_config(["experiment=tiny", *words.split()]), layout)


@pytest.mark.parametrize("name", ROUTERS)
def test_one_expert_with_a_gate_of_one_teaches_no_router(name: str) -> None:
    kind = ROUTERS[name].settings
    words = ["experiment=tiny", f"mome/router={name}", "mome.top_k=1"]
    if True in kind.renormalizes and kind.learns:
        with pytest.raises(UserError, match=r"mome\.top_k=1 and mome\.renormalize=true: .* learns nothing"):
            check_learning(load_config([*words, "mome.renormalize=true"]))
    else:
        check_learning(load_config([*words, f"mome.renormalize={kind.renormalizes[0]}"]))
    if False in kind.renormalizes:
        check_learning(load_config([*words, "mome.renormalize=false"]))


def test_a_group_of_one_expert_teaches_no_router() -> None:
    words = ["experiment=tiny", "mome/router=groups", "mome.top_k=4"]
    check_learning(load_config(words))
    for more in ("mome.router.visible=1", "mome.routed_experts=4"):
        with pytest.raises(UserError, match=r"mome\.top_k=4 and .* experts enough that each group has two"):
            check_learning(load_config([*words, more]))
