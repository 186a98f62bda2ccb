"""The gradients that a module's backward pass adds, against autograd of the losses that they belong to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mome_dist.moe.balance import add_balance, add_batch_loss, load_balance_loss, router_z_loss
from mome_dist.moe.load import PassLoad
from mome_dist.moe.routing import Routing, route
from mome_dist.token_context import TokenContext

EXPERTS, TOP_K, BALANCE, Z, SHARE = 6, 2, 0.3, 0.07, 0.4
CONTEXT = TokenContext.of([("asr(4)", [5, 3]), ("vsr(2)", [9]), ("asr(4)", [2, 1])])  # a view may come twice; 4 dead


def _logits(seed: int = 0) -> Tensor:
    return 2 * torch.randn(CONTEXT.tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))


def _routing(logits_TE: Tensor, **settings: Any) -> Routing:
    return route(logits_TE, TOP_K, True, CONTEXT.alive_N, **settings)


def _expected(logits_TE: Tensor, balance: float, z: float, others: list[Tensor], **settings: Any) -> Tensor:
    """Gradient of the logits by autograd: the losses of each view over all ranks' tokens, in the mean over views."""
    logits_TE = logits_TE.clone().requires_grad_()
    routing, total = _routing(logits_TE, **settings), torch.zeros(())
    everyone = [routing, *(_routing(each, **settings) for each in others)]
    for members_T in CONTEXT.members_VN.bool():
        counts_E = sum(each.restricted_to(members_T).selected_TE().sum(dim=0) for each in everyone)
        tokens = members_T.sum() * len(everyone)
        assert isinstance(counts_E, Tensor)
        own = routing.restricted_to(members_T)
        total = total + balance * load_balance_loss(own, counts_E, tokens) + z * router_z_loss(own, tokens)
    (gradient,) = torch.autograd.grad(SHARE * total / len(CONTEXT.members_VN), logits_TE)
    return gradient


class _WithOthers(PassLoad):
    """What two ranks sum up."""

    others: PassLoad

    def all(self) -> Tensor:
        return super().all() + self.others.all()


def _counted(load: PassLoad, routing: Routing) -> PassLoad:
    load.put(0, CONTEXT, EXPERTS, routing.experts_TK)
    load.reduce()
    return load


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("balance", "z"), [(BALANCE, 0.0), (0.0, Z), (BALANCE, Z)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_are_those_of_the_losses(score: str, balance: float, z: float, ranks: int) -> None:
    others = [_logits(seed=1)][: ranks - 1]
    logits_TE = _logits().requires_grad_()
    routing = _routing(logits_TE, score=score)
    load = PassLoad(CONTEXT.view_names, None, SHARE)
    if others:
        load = _WithOthers(CONTEXT.view_names, None, SHARE)
        load.others = _counted(PassLoad(CONTEXT.view_names, None), _routing(others[0], score=score))
    output_TH = torch.randn(CONTEXT.tokens, 3, requires_grad=True)
    added_TH = add_balance(output_TH, routing, CONTEXT.members_VN, load, 0, balance, z)
    assert torch.equal(added_TH, output_TH), "the output is what it was"
    _counted(load, routing)  # only now: the backward pass is the first to read
    gradient_TH = torch.randn_like(output_TH)
    of_logits_TE, of_output_TH = torch.autograd.grad(added_TH, (logits_TE, output_TH), gradient_TH)
    assert torch.equal(of_output_TH, gradient_TH), "and so is its gradient"
    expected_TE = _expected(logits_TE.detach(), balance, z, others, score=score)
    # Sums over some twenty tokens, taken in another order.
    torch.testing.assert_close(of_logits_TE, expected_TE, rtol=1e-5, atol=1e-7)
    assert expected_TE[: CONTEXT.alive].abs().max() > 1e-4 and not of_logits_TE[CONTEXT.alive :].any()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_of_the_whole_batch_joins_the_backward_pass(ranks: int) -> None:
    def batch_loss(sums_VS: Tensor, tokens_V: Tensor) -> Tensor:
        return (sums_VS / tokens_V[:, None]).prod(dim=1).square().sum()

    all_logits = [_logits(seed).requires_grad_() for seed in range(ranks)]
    sums = [CONTEXT.members_VN @ logits_TE.softmax(dim=1)[:, :2] for logits_TE in all_logits]
    tokens_V = ranks * CONTEXT.sizes_V2[:, 0].float()
    (expected_TE,) = torch.autograd.grad(SHARE * batch_loss(torch.stack(sums).sum(0), tokens_V), all_logits[:1])

    class Summed(PassLoad):
        """What two ranks sum up."""

        def sums_of(self, place: int) -> Tensor:
            return super().sums_of(place) + sum(each.detach() for each in sums[1:])

        def of(self, place: int) -> Tensor:
            return ranks * super().of(place)

    load = Summed(CONTEXT.view_names, None, SHARE)
    logits_TE = _logits().requires_grad_()
    own_VS = CONTEXT.members_VN @ logits_TE.softmax(dim=1)[:, :2]
    output_TH = torch.randn(CONTEXT.tokens, 3, requires_grad=True)
    added_TH = add_batch_loss(output_TH, own_VS, load, 0, batch_loss)
    assert torch.equal(added_TH, output_TH), "the output is what it was"
    load.put(0, CONTEXT, EXPERTS, _routing(logits_TE).experts_TK, sums_VS=own_VS)
    load.reduce()
    gradient_TH = torch.randn_like(output_TH)
    of_logits_TE, of_output_TH = torch.autograd.grad(added_TH, (logits_TE, output_TH), gradient_TH)
    assert torch.equal(of_output_TH, gradient_TH), "and so is its gradient"
    torch.testing.assert_close(of_logits_TE, expected_TE, rtol=1e-5, atol=1e-9)
    assert expected_TE.abs().max() > 1e-5


def test_counts_are_those_of_each_view() -> None:
    routing = _routing(_logits())
    counts_VX = _counted(PassLoad(CONTEXT.view_names, None), routing).of(0)
    for view, (first, stop, positions) in enumerate([(0, 8, 8), (8, 17, 9), (17, 20, 7)]):
        asked = torch.bincount(routing.experts_TK[first:stop].flatten(), minlength=EXPERTS)
        assert counts_VX[view].tolist() == [*asked.tolist(), *[0] * EXPERTS, stop - first, positions]


def test_losses_in_training_are_constant_in_what_is_counted() -> None:
    """Without a summed count there is no gradient to add: reading it too early is an error, not a wrong number."""
    logits_TE = _logits().requires_grad_()
    load = PassLoad(CONTEXT.view_names, None)
    added_TH = add_balance(torch.zeros(CONTEXT.tokens, 3), _routing(logits_TE), CONTEXT.members_VN, load, 0, 1.0, 0.0)
    with pytest.raises(AssertionError, match="`reduce` comes first"):
        added_TH.sum().backward()
