"""Which views a step trains on, and what each counts for: all draws enumerated, against Hugging Face's autograd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.views import View, ViewSchedule, all_views
from mome_dist.training.batches import Step
from mome_dist.verification.probe import write_random_llama
from tests.parallel import toy

AUDIO, VIDEO = [4, 16], [2, 3, 5]
VIEWS = all_views(["asr", "vsr", "avsr"], AUDIO, VIDEO, AUDIO, VIDEO)
PAIRS = [(audio, video) for audio in AUDIO for video in VIDEO]
WEIGHTS = {"asr": 1.0, "vsr": 1.5, "avsr": 1.0}


def _schedules(seed: int) -> dict[str, ViewSchedule]:
    return {
        "all": ViewSchedule.of_views(VIEWS, None, seed),
        "some": ViewSchedule.of_views(VIEWS, 2, seed),
        "rates": ViewSchedule.of_rates(VIEWS, seed),
    }


@pytest.mark.parametrize("kind", ["some", "rates"])
def test_draws_are_a_function_of_seed_and_step(kind: str) -> None:
    straight, other = ([_schedules(seed)[kind].of_step(step) for step in range(60)] for seed in (1, 2))
    # As another rank, or a run that is resumed at any step, has them.
    assert [_schedules(1)[kind].of_step(step) for step in reversed(range(60))] == straight[::-1]
    assert straight != other and len({tuple(views) for views in straight}) > len(PAIRS) / 2


def test_all_views_are_seen_equally_often() -> None:
    assert _schedules(1)["all"].of_step(3) == VIEWS
    steps = len(VIEWS)  # of two views each: two decks
    drawn = Counter(view for step in range(steps) for view in _schedules(1)["some"].of_step(step))
    assert set(drawn.values()) == {2} and set(drawn) == set(VIEWS)


def test_a_draw_of_rates_is_every_task_at_a_pair_and_a_deck_has_every_pair_once() -> None:
    schedule = _schedules(1)["rates"]
    for first in (0, len(PAIRS), 7 * len(PAIRS)):
        drawn = [schedule.of_step(step) for step in range(first, first + len(PAIRS))]
        assert sorted(view.rates for _, _, view in drawn) == sorted(f"({a},{v})" for a, v in PAIRS)
        for asr, vsr, avsr in drawn:
            assert asr == View("asr", avsr.audio_rate, None) and vsr == View("vsr", None, avsr.video_rate)


def test_rates_of_one_stream() -> None:
    asr = ViewSchedule.of_rates(all_views(["asr"], AUDIO, VIDEO, AUDIO, VIDEO), 0)
    assert asr.hands == ((View("asr", 4, None),), (View("asr", 16, None),))
    apart = ViewSchedule.of_rates(all_views(["asr", "vsr"], AUDIO, VIDEO, [1], [1]), 0)
    assert [[view.rates for view in hand] for hand in apart.hands] == [[f"({a})", f"({v})"] for a, v in PAIRS]


@pytest.mark.parametrize("kind", ["all", "some", "rates"])
def test_what_is_told_of_the_draws_is_what_is_drawn(kind: str) -> None:
    schedule = _schedules(5)[kind]
    # Whole decks, none of which ends within a step.
    drawn = [schedule.of_step(step) for step in range(schedule.steps_of_decks(2 * schedule.per_step))]
    counted = Counter(view for step in drawn for view in step)
    assert {view: schedule.share(view) * len(drawn) for view in VIEWS} == pytest.approx(counted)
    sizes = {view: 100 // (view.audio_rate or 100) + 100 // (view.video_rate or 100) for view in VIEWS}
    largest = sum(sizes[view] for view in schedule.largest(sizes.__getitem__))
    assert max(sum(map(sizes.__getitem__, step)) for step in drawn) <= largest
    if kind == "rates":
        assert schedule.largest(sizes.__getitem__) == [VIEWS[0], VIEWS[2], View("avsr", 4, 2)]
        assert schedule.share_reading("audio") == schedule.share_reading("video") == 1


def test_two_of_eleven_views_may_do_without_a_stream() -> None:
    hears = [view.audio_rate is not None for view in VIEWS]
    pairs = [(one, other) for i, one in enumerate(hears) for other in hears[i + 1 :]]
    assert _schedules(0)["some"].share_reading("audio") == pytest.approx(sum(a or b for a, b in pairs) / len(pairs))


def _loss_and_gradients(model: MoMESpeechLM, views: Sequence[View], weights: dict[str, float]) -> torch.Tensor:
    """The loss of a step in some views and its gradients, fp32, one after the other in one vector."""
    batch = toy.microbatch([0, 1, 2], views)
    labels = len(batch.tokens.labels.ids_L) // len(views)
    step = Step([batch], list(views), labels, 3, weights)
    loss = model.loss(batch.tokens, batch.features, step.weights) / (labels * len(views))
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    found = (torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients, strict=True))
    return torch.cat([loss[None], *(each.flatten() for each in found)]).detach()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MoMESpeechLM:
    return toy.reference(write_random_llama(tmp_path_factory.mktemp("llama")), "mhsa")


def test_the_sampled_loss_is_unbiased(model: MoMESpeechLM) -> None:
    """The mean over all draws is the mean over all pairs for AVSR, and for three tasks the weighted mean over the tasks
    of theirs; so are the gradients."""
    schedule, by_task = _schedules(0)["rates"], {}
    for task in WEIGHTS:
        views = [view for view in VIEWS if view.task == task]
        by_task[task] = torch.stack([_loss_and_gradients(model, [view], {}) for view in views]).mean(dim=0)
        torch.testing.assert_close(_loss_and_gradients(model, views, {}), by_task[task])  # all views in one step
    for weights in (WEIGHTS, {"asr": 0.0, "vsr": 0.0, "avsr": 3.0}):
        draws = torch.stack([_loss_and_gradients(model, hand, weights) for hand in schedule.hands])
        expected = torch.stack([weights[task] * by_task[task] for task in WEIGHTS]).sum(dim=0) / 3
        torch.testing.assert_close(draws.mean(dim=0), expected)
        assert draws[:, 0].std() > 1e-3, "draws differ"


def test_a_weight_is_a_factor_of_its_views_sum(model: MoMESpeechLM) -> None:
    views = _schedules(0)["rates"].hands[1]
    batch, vsr = toy.microbatch([0, 1, 2], views), toy.microbatch([0, 1, 2], [views[1]])
    plain, ones, twice = (model.loss(batch.tokens, batch.features, w) for w in (None, [1.0] * 3, [1.0, 2.0, 1.0]))
    torch.testing.assert_close(ones, plain)
    torch.testing.assert_close(twice - ones, model.loss(vsr.tokens, vsr.features))
