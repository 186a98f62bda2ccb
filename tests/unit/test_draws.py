"""Random numbers that are functions of what they are drawn for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from mome_dist.data.parts import Parts
from mome_dist.draws import draw_of, draws_of_tokens, gumbels, uniforms
from mome_dist.parallel.layout import Layout
from mome_dist.speech.sequence import AUDIO, VIDEO, Example
from mome_dist.speech.views import View
from mome_dist.token_context import TokenContext
from mome_dist.training.batches import BatchBuilder
from tests.closed_routers import EXPERTS, HIDDEN, build, experts_used, normal

LENGTHS = (300, 200, 500)
DRAWS = [draw_of("clip", number) for number in range(3)]


def test_no_two_tokens_have_the_same_draw() -> None:
    draws_N = draws_of_tokens(range(100), [50] * 100, 5008)
    assert draws_N[:5000].unique().numel() == 5000
    assert draws_N.dtype == torch.int64


def test_a_token_draws_the_same_wherever_it_lies() -> None:
    whole = TokenContext.of([("asr(4)", LENGTHS)], multiple=1, draws=DRAWS)
    turned = TokenContext.of([("asr(4)", LENGTHS[::-1])], multiple=1, least=1100, draws=DRAWS[::-1])
    assert whole.draws_N is not None and turned.draws_N is not None
    by_clip, other = whole.draws_N.split(LENGTHS), turned.draws_N[:1000].split(LENGTHS[::-1])
    assert all(map(torch.equal, by_clip, other[::-1]))
    parts = [whole.part(rank, 4).draws_N for rank in range(4)]
    assert torch.equal(torch.cat([part for part in parts if part is not None]), whole.draws_N)
    numbers_NC = uniforms(whole.draws_N, 5, 3)
    assert torch.equal(uniforms(whole.draws_N[700:], 5, 3), numbers_NC[700:])
    assert not torch.equal(uniforms(whole.draws_N, 6, 3), numbers_NC)


def test_numbers_are_even_and_know_nothing_of_each_other() -> None:
    draws_N = draws_of_tokens([draw_of(number) for number in range(50)], [800] * 50, 40_000)
    numbers_NC = uniforms(draws_N, draw_of("a") >> 1, 8)
    assert numbers_NC.min() > 0 and numbers_NC.max() < 1
    error = 5 / math.sqrt(40_000)
    assert (numbers_NC.mean(dim=0) - 0.5).abs().max() < error * math.sqrt(1 / 12)
    assert (numbers_NC.var(dim=0) - 1 / 12).abs().max() < error / 12
    shares = torch.histc(numbers_NC, 64, 0, 1) / numbers_NC.numel()
    assert (shares * 64 - 1).abs().max() < 5 * math.sqrt(64 / numbers_NC.numel())
    columns = torch.cat([numbers_NC[1:], numbers_NC[:-1], uniforms(draws_N, draw_of("b") >> 1, 8)[1:]], dim=1).t()
    assert torch.corrcoef(columns).fill_diagonal_(0).abs().max() < error


def test_gumbels_are_finite_and_draw_with_probabilities() -> None:
    draws_N = draws_of_tokens([1], [40_000], 40_000)
    noise_NC = gumbels(draws_N, 3, 3)
    assert noise_NC.min() > -3 and noise_NC.max() < 17
    probs_C = torch.tensor([0.6, 0.3, 0.1])
    drawn_C = torch.bincount((probs_C.log() + noise_NC).argmax(dim=1), minlength=3) / 40_000
    torch.testing.assert_close(drawn_C, probs_C, atol=5 * math.sqrt(0.25 / 40_000), rtol=0)


def test_random_experts_that_are_drawn_anew_are_others_in_every_layer_and_step() -> None:
    router, other = build("random", 4, anew=True), build("random", 4, anew=True)
    other.initialize("mome.1", 3)
    tokens, later = (TokenContext.of([("asr(4)", [2000])], multiple=1, draws=[step]) for step in range(2))
    hidden_TH = normal(2000, HIDDEN)
    routing = router(hidden_TH, tokens)
    assert experts_used(routing).eq(4).all() and routing.gates_TK.eq(0.25).all()
    selected_TE = routing.selected_TE().float()
    assert torch.equal(router(-hidden_TH, tokens).experts_TK, routing.experts_TK)
    for another in (other(hidden_TH, tokens), router(hidden_TH, later)):  # of four, 4 / 24 of four are the same
        same = (selected_TE * another.selected_TE()).sum() / 2000
        assert abs(float(same) - 16 / EXPERTS) < 0.1
    assert (selected_TE.mean(dim=0) - 4 / EXPERTS).abs().max() < 5 * math.sqrt(5 / 36 / 2000)
    fixed = build("random", 4)
    assert torch.equal(router.eval()(hidden_TH, None).experts_TK, fixed(hidden_TH, None).experts_TK)


class _Sequences:
    """Lays out speech and one word."""

    codec = SimpleNamespace(encode=lambda text: [9])

    def overhead(self, view: View) -> int:
        return 1

    def example(self, view: View, audio_tokens: int, video_tokens: int, text: str) -> Example:
        return Example([1, *[AUDIO] * audio_tokens, *[VIDEO] * video_tokens, 9, 2], 1 + audio_tokens + video_tokens)


def _drawn(step: int, rank: int, ranks: int, parts: int) -> set[int]:
    """What the tokens of a rank's part of a step draw."""
    utterances: Any = [SimpleNamespace(id=f"u{n}", length=9, samples=16_000, frames=25, text="") for n in range(6)]
    sequences: Any = _Sequences()
    layout, views = Layout.for_world(ranks), [View("asr", 4, None), View("avsr", 16, 5), View("asr", 4, None)]
    builder = BatchBuilder(
        utterances, sequences, None, Parts(parts), rank, ranks, torch.device("cpu"), layout, draws=True
    )
    contexts = [each.tokens.context for each in builder.build([4, 0, 2, 5], views, step).microbatches]
    draws = [draw for each in contexts if each.draws_N is not None for draw in each.draws_N[: each.alive].tolist()]
    assert len(set(draws)) == len(draws) == sum(each.alive for each in contexts)
    return set(draws)


def test_clips_of_a_step_draw_the_same_on_any_ranks_and_in_any_microbatches() -> None:
    whole = _drawn(7, 0, 1, 1)
    assert whole == _drawn(7, 0, 2, 2) | _drawn(7, 1, 2, 2)
    assert not whole & _drawn(8, 0, 1, 1)
