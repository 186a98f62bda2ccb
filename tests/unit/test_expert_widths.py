"""Experts of unequal widths: series, units that an expert lacks, the loss that weighs them, and counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mome_dist.config import load_config
from mome_dist.config.derived import expert_in_words, widths_of
from mome_dist.config.values import check_values
from mome_dist.errors import UserError
from mome_dist.evaluation.arithmetic import mome_parameters
from mome_dist.moe.balance import add_balance, load_balance_loss
from mome_dist.moe.forms.registry import FORMS, find_form
from mome_dist.moe.load import PassLoad
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.routing import Routing, route
from mome_dist.moe.widths import Widths, series
from mome_dist.planning.job import Clip, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.token_context import TokenContext

HIDDEN = 20
NARROWING = [name for name in FORMS if find_form(name).narrows]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_series_keep_the_mean() -> None:
    assert series("arithmetic", 23, 12) == tuple(range(1, 24))
    assert series("arithmetic", 8, 4) == (1, 1, 2, 3, 5, 6, 7, 7)
    assert series("geometric", 4, 4) == (1, 2, 4, 9)
    for rule in ("arithmetic", "geometric"):
        for experts, mean in ((2, 1), (2, 5), (8, 4), (23, 12), (64, 2), (3, 1000)):
            widths = series(rule, experts, mean)
            assert len(widths) == experts and sum(widths) == experts * mean and min(widths) >= 1
            assert list(widths) == sorted(widths)


@pytest.mark.parametrize("name", NARROWING)
def test_units_that_an_expert_lacks_are_zero_and_stay_so(name: str) -> None:
    widths = Widths((1, 2, 3, 5), 2)
    module = LocalMoME(HIDDEN, 4, 2, 1, 5, expert=name, widths=widths)
    module.initialize("mome.0", seed=0)
    assert module.shared is not None
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        (module(_random(40, HIDDEN, seed=step)) * _random(40, HIDDEN, seed=9)).sum().backward()
        optimizer.step()
    for stack, own in ((module.routed, widths.routed), (module.shared, (widths.shared,))):
        for part in stack.form.parts:
            for value, width in zip(stack.get_parameter(part.name).detach(), own, strict=True):
                assert value.any()
                for axis, dim in enumerate(part.dims):
                    if dim == "b":
                        assert value.narrow(axis, 0, width).any()
                        assert not value.narrow(axis, width, 5 - width).any()


@pytest.mark.parametrize("name", NARROWING)
def test_experts_are_those_of_their_own_width(name: str) -> None:
    """Cut to its units, an expert computes the same; its weights do not depend on how wide the others are."""
    widths = Widths((1, 3), 2)
    module = LocalMoME(HIDDEN, 2, 1, 0, 3, expert=name, widths=widths)
    module.initialize("mome.0", seed=0)
    form, rows = find_form(name), _random(9, HIDDEN)
    for number, width in enumerate(widths.routed):
        parts = [_random(*part.shape[1:], seed=5) for part in module.routed.weights()]
        cut = []
        for part, value in zip(form.parts, parts, strict=True):
            for axis, dim in enumerate(part.dims):
                if dim == "b":
                    value.narrow(axis, width, 3 - width).zero_()
            cut.append(value[tuple(slice(width if dim == "b" else None) for dim in part.dims)])
        torch.testing.assert_close(form.one(rows, *parts), form.one(rows, *cut), rtol=1e-5, atol=1e-5)
        alone = LocalMoME(HIDDEN, 2, 1, 0, 3, expert=name)
        alone.initialize("mome.0", seed=0)
        for part in form.parts:
            ours, theirs = module.routed.get_parameter(part.name)[number], alone.routed.get_parameter(part.name)[number]
            own = tuple(slice(width if dim == "b" else None) for dim in part.dims)
            assert torch.equal(ours[own], theirs[own])


def _routing(tokens: int) -> Routing:
    return route(_random(tokens, 4, seed=3).requires_grad_(), 2, True)


def test_the_loss_that_favours_small_experts() -> None:
    routing, tokens = _routing(50), torch.tensor(50)
    counts_E = routing.selected_TE().sum(dim=0)
    plain = load_balance_loss(routing, counts_E, tokens)
    for equal in ((3, 3, 3, 3), (1, 1, 1, 1)):
        weights = Widths(equal, 3, weighed=True).balance_weights
        assert torch.equal(load_balance_loss(routing, counts_E, tokens, torch.tensor(weights)), plain), "Switch loss"
    weights = Widths((1, 2, 3, 6), 3, weighed=True).balance_weights
    assert weights is not None and weights == (1 / 3, 2 / 3, 1.0, 2.0)
    found = load_balance_loss(routing, counts_E, tokens, torch.tensor(weights))
    fraction, probability = counts_E / 100, routing.probs_TE.mean(dim=0)
    expected = 4 * sum(w * f * p for w, f, p in zip(weights, fraction, probability, strict=True))
    torch.testing.assert_close(found, expected)
    assert Widths((1, 2, 3, 6), 3).balance_weights is None


def test_training_has_the_gradient_of_that_loss() -> None:
    context = TokenContext.of([("one", [50])], multiple=1)
    weights_E = torch.tensor(Widths((1, 2, 3, 6), 3, weighed=True).balance_weights)
    gradients = []
    for whole in (True, False):
        logits_TE = _random(50, 4, seed=3).requires_grad_()
        routing = route(logits_TE, 2, True)
        if whole:
            loss = load_balance_loss(routing, routing.selected_TE().sum(dim=0), torch.tensor(50), weights_E)
            (0.1 * loss).backward()
        else:
            load = PassLoad(context.view_names, None)
            load.put(0, context, 4, routing.experts_TK)
            output = _random(50, HIDDEN).requires_grad_()
            added = add_balance(output, routing, context.members_VN, load, 0, 0.1, 0.0, (), weights_E)
            load.reduce()
            (added * 0).sum().backward()
        gradients.append(logits_TE.grad)
    assert gradients[0] is not None and gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_counts_leave_out_what_is_lacking() -> None:
    """1 + 2 + ... + 23 = 23 * 12: as many numbers as MoME-23/4, and as many units for a token in the mean."""
    equal, unequal = (load_config(["experiment=lrs3", f"mome={name}"]) for name in ("mhsa", "unequal"))
    assert widths_of(equal) is None and expert_in_words(equal) == "bottleneck 12"
    widths = widths_of(unequal)
    assert widths is not None and widths.widest == 23 and expert_in_words(unequal) == "bottleneck of 1 to 23 units"
    assert mome_parameters(unequal, 3072, 28) == mome_parameters(equal, 3072, 28)
    jobs = [
        job_of(config, find_shape("llama-3.2-3b"), Clip(), {"audio": 8, "video": 8}, on_gpu=True)
        for config in (equal, unequal)
    ]
    assert jobs[0].token_macs == jobs[1].token_macs == 5 * 2 * 3072 * 12
    assert jobs[1].expert_parameters > jobs[0].expert_parameters, "in memory all are as wide as the widest"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mome.widths=[1,2]"], r"mome\.widths=\[1, 2\]: give 23 numbers"),
        (["mome.widths=[1,2]", "mome.width_rule=geometric"], r"both given"),
        (["mome=latent", "mome.width_rule=geometric"], r"mome\.expert=latent has equal widths only"),
        (["mome.balance_by_width=true"], r"no effect on equal widths"),
    ],
)
def test_widths_that_do_not_fit_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_values(load_config(["experiment=tiny", "mome.routed_experts=23", *settings]))
