"""Experts that choose tokens, in closed form: how many each takes, of which utterance, and decoding as training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mome_dist.errors import UserError
from mome_dist.moe.routers.expert_choice import pool_places
from mome_dist.moe.routing import Routing, route
from mome_dist.parallel.layout import Layout
from mome_dist.planning.job import dispatches
from mome_dist.preflight import check_experts
from mome_dist.token_context import Modality, OneView, TokenContext
from mome_dist.verification.cases import standard_cases
from tests.closed_routers import EXPERTS, build, configured, normal

AUDIO, VIDEO, TEXT = int(Modality.AUDIO), int(Modality.VIDEO), int(Modality.TEXT)


def _tokens(*speech: int, text: int = 3, dead: int = 0) -> TokenContext:
    """Sequences of so many speech tokens in the middle of text."""
    kinds = [
        kind
        for size in speech
        for kind in [TEXT, *[AUDIO] * (size // 2), *[VIDEO] * (size - size // 2), *[TEXT] * text]
    ]
    lengths = [1 + size + text for size in speech]
    return TokenContext.of([("avsr(4,2)", lengths)], kinds, multiple=1, least=len(kinds) + dead)


def _routed(logits_TE: Tensor, tokens: TokenContext | OneView | None, top_k: int = 4) -> Routing:
    return build("expert_choice", top_k, "mome.renormalize=false").route(logits_TE, tokens)


def test_every_expert_takes_as_many_of_each_utterance() -> None:
    sizes, tokens = (48, 7, 1, 0, 24), _tokens(48, 7, 1, 0, 24, dead=5)
    logits_TE = normal(tokens.tokens, EXPERTS)
    selected_TE = _routed(logits_TE, tokens).selected_TE()
    speech_N, sequence_N = tokens.modality_N != Modality.TEXT, tokens.sequence_N
    probs_TE = logits_TE.softmax(dim=1)
    for number, size in enumerate(sizes):
        pool_N = speech_N & (sequence_N == number)
        taken = math.ceil(4 * size / EXPERTS)
        assert selected_TE[pool_N].sum(dim=0).eq(taken).all() and int(pool_N.sum()) == size
        for expert in range(EXPERTS):  # those that suit it best
            scores_N, chosen_N = probs_TE[pool_N, expert], selected_TE[pool_N, expert]
            assert torch.equal(scores_N[chosen_N].sort().values, scores_N.sort().values[size - taken :])
    alive = tokens.alive
    plain_TE = route(logits_TE, 4, False).selected_TE()
    assert torch.equal(selected_TE[:alive][~speech_N[:alive]], plain_TE[:alive][~speech_N[:alive]])
    assert not selected_TE[alive:].any()


def test_gates_are_probabilities_as_they_are() -> None:
    tokens = _tokens(40, 30)
    routing = _routed(normal(tokens.tokens, EXPERTS), tokens)
    assert torch.equal(routing.gates_TE(), routing.probs_TE * routing.selected_TE())


def test_random_scores_leave_few_tokens_without_an_expert() -> None:
    """(1 - K / N)^N of them, 1.26 % for 4 of 24, where scores are independent; probabilities, which add up to one,
    leave fewer: if some are low, others are high."""
    size = 24_000
    taken_TE = pool_places(normal(size, EXPERTS), torch.zeros(size, dtype=torch.long)) < 4 * size // EXPERTS
    expected = (1 - 4 / 24) ** 24
    assert round(100 * expected, 2) == 1.26
    share = float((taken_TE.sum(dim=1) == 0).float().mean())
    assert abs(share - expected) < 5 * math.sqrt(expected / size)
    tokens = _tokens(size)
    selected_TE = _routed(normal(tokens.tokens, EXPERTS) / 10, tokens).selected_TE()[1 : size + 1]
    assert int(selected_TE.sum()) == 4 * size
    assert 0 < float((selected_TE.sum(dim=1) == 0).float().mean()) < expected / 2


def test_earlier_tokens_go_first_at_equal_scores() -> None:
    tokens = _tokens(12)
    selected_TE = _routed(torch.zeros(tokens.tokens, EXPERTS), tokens).selected_TE()
    assert selected_TE[1:3].all() and not selected_TE[3:13].any()


def test_an_utterance_chooses_alone_as_in_a_batch_and_while_decoding() -> None:
    tokens, top = _tokens(20, 33, 9), 4
    logits_TE = normal(tokens.tokens, EXPERTS)
    gates_TE = _routed(logits_TE, tokens).gates_TE()
    rows = torch.split(logits_TE, list(tokens.lengths))
    kinds = torch.split(tokens.modality_N, list(tokens.lengths))
    longest = max(tokens.lengths)
    for number, expected_TE in enumerate(torch.split(gates_TE, list(tokens.lengths))):
        alone = OneView("avsr(4,2)", kinds[number], len(rows[number]))
        assert torch.equal(_routed(rows[number], alone).gates_TE(), expected_TE)
        prefix = len(rows[number]) - 2  # all but words
        part = OneView("avsr(4,2)", kinds[number][:prefix], prefix)
        assert torch.equal(_routed(rows[number][:prefix], part).gates_TE(), expected_TE[:prefix])
    padded_TE = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).flatten(0, 1)
    padded_N = torch.nn.utils.rnn.pad_sequence(list(kinds), batch_first=True).flatten()
    batch = OneView("avsr(4,2)", padded_N, 3 * longest, rows=3)
    together = _routed(padded_TE, batch).gates_TE().view(3, longest, -1)
    for found_TE, expected_TE in zip(together, torch.split(gates_TE, list(tokens.lengths)), strict=True):
        assert torch.equal(found_TE[: len(expected_TE)], expected_TE)
    words = _routed(logits_TE, OneView("avsr(4,2)", None, 0))
    assert words.experts_TK.shape[1] == top and words.chosen_TK is None  # what one token of a transcript reads


def test_sequences_that_ranks_share_are_refused() -> None:
    config = configured("expert_choice", 4, "mome.renormalize=false")
    layout = Layout.for_world(2, tp=2, sequence_parallel=True)
    with pytest.raises(
        UserError, match=r"mome\.router\.name=expert_choice .*parallel\.sequence_parallel=true.*set it to"
    ):
        check_experts(config, layout)
    router = build("expert_choice", 4, "mome.renormalize=false").spec
    cases = standard_cases(router=router.settings)
    assert 0 < len(cases) < len(standard_cases())
    assert all(case.dispatch != "alltoall" and not case.layout.sequence_parallel for case in cases)
    assert not dispatches(layout, EXPERTS, router) and dispatches(Layout.for_world(2, tp=2), EXPERTS, router)
