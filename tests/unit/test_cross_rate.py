"""Coarse views learn from fine ones: who teaches whom, which tokens say the same, and both terms by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.aligned_tokens import Aligned, ViewPair
from mome_dist.config import load_config
from mome_dist.config.load import config_of
from mome_dist.config.values import check_values
from mome_dist.errors import UserError
from mome_dist.llm.logit_distillation import logit_divergence
from mome_dist.moe.route_distillation import RouteDistillation
from mome_dist.speech.cross_rate import align, coarse_tokens, overlaps, view_pairs
from mome_dist.speech.sequence import AUDIO, VIDEO, Example
from mome_dist.speech.views import View, all_views

PAPER = all_views(["asr", "vsr", "avsr"], [4, 16], [2, 5], [4, 16], [2, 5])


def _names(views: list[View]) -> list[str]:
    return [pair.name(views) for pair in view_pairs(views)]


def test_the_finest_view_of_a_task_teaches_those_that_it_is_finer_than() -> None:
    avsr = [f"avsr(4,2)>avsr({rates})" for rates in ("4,5", "16,2", "16,5")]
    assert _names(PAPER) == ["asr(4)>asr(16)", "vsr(2)>vsr(5)", *avsr]
    drawn = [View("avsr", 4, 5), View("avsr", 16, 2), View("avsr", 16, 5), View("asr", 2, None)]
    assert _names(drawn) == ["avsr(4,5)>avsr(16,5)"], "neither of the first two is finer than the other"
    assert view_pairs([View("asr", 4, None)] * 2) == (), "the same rate has nothing to teach"


def _groups(fine: int, coarse: int, *rates: int) -> list[dict[int, float]]:
    tokens, shares = overlaps(fine, coarse, *rates)
    return [{int(t): float(s) for t, s in zip(*row, strict=True) if s} for row in zip(tokens, shares, strict=True)]


def test_fine_tokens_count_by_the_frames_that_they_share_with_a_coarse_one() -> None:
    quarters = [{first + i: 0.25 for i in range(4)} for first in (0, 4)]
    assert _groups(8, 2, 4, 16) == quarters, "groups of exactly four"
    assert _groups(7, 2, 4, 16)[1] == pytest.approx({4: 1 / 3, 5: 1 / 3, 6: 1 / 3}), "averaged over what there is"
    fifths = [{0: 0.4, 1: 0.4, 2: 0.2}, {2: 0.2, 3: 0.4, 4: 0.4}]
    assert _groups(5, 2, 2, 5) == [pytest.approx(each) for each in fifths], "2 does not divide 5"
    assert _groups(1, 1, 4, 16) == [{0: 1.0}], "a clip shorter than a window"
    assert _groups(3, 3, 4, 4) == [{0: 1.0}, {1: 1.0}, {2: 1.0}]


def _aligned(fine: int, coarse: int, fine_rate: int, coarse_rate: int) -> Aligned:
    """Fine tokens first, then coarse ones."""
    tokens, shares = map(torch.from_numpy, overlaps(fine, coarse, fine_rate, coarse_rate))
    rows, weights = torch.arange(fine, fine + coarse), torch.full((1, coarse), 1 / coarse)
    return Aligned((ViewPair(0, 1),), rows, tokens, shares, weights)


def _distilled(aligned: Aligned, logits_TE: Tensor, weight: float = 1.0) -> tuple[float, Tensor]:
    """The term of one layer, and its gradient by the logits."""
    logits_TE = logits_TE.clone().requires_grad_()
    terms: list[Tensor] = []
    distillation, probs_TE = RouteDistillation(aligned, weight, None, terms), logits_TE.softmax(dim=1)
    distillation.put(0, probs_TE)
    distillation.reduce()
    output = torch.zeros(len(logits_TE), 3, requires_grad=True)
    distillation.join(output, probs_TE, 0).sum().backward()
    assert output.grad is not None and bool((output.grad == 1).all()), "what was there before goes through"
    assert logits_TE.grad is not None
    return terms[0].item(), logits_TE.grad


def test_eight_fine_and_two_coarse_tokens_by_hand() -> None:
    fine = [[0.9, 0.1], [0.7, 0.3], [0.5, 0.5], [0.3, 0.7], [0.2, 0.8], [0.2, 0.8], [0.2, 0.8], [0.2, 0.8]]
    coarse = [[0.5, 0.5], [0.2, 0.8]]
    loss, gradient_TE = _distilled(_aligned(8, 2, 4, 16), torch.tensor(fine + coarse).log(), weight=0.3)
    target = 0.6, 0.4  # of the first four
    expected = (target[0] * math.log(target[0] / 0.5) + target[1] * math.log(target[1] / 0.5)) / 2
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient_TE[8:], torch.tensor([[-0.015, 0.015], [0.0, 0.0]]), rtol=0, atol=1e-7)
    assert not gradient_TE[:8].any(), "the fine view is a constant"


def test_the_same_rate_twice_teaches_nothing() -> None:
    logits_TE = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    loss, gradient_TE = _distilled(_aligned(5, 5, 4, 4), torch.cat([logits_TE, logits_TE]))
    assert abs(loss) < 1e-6 and gradient_TE.abs().max() < 1e-7


def test_parts_of_a_pass_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    probs_TE, aligned = torch.randn(16, 5, generator=generator).softmax(dim=1), _aligned(11, 4, 2, 5)
    whole_ME = (probs_TE[aligned.fine_MW] * aligned.shares_MW[..., None]).sum(dim=1)
    parts = [aligned.part(rank, 8) for rank in range(2)]
    found = [(probs_TE[8 * r :][:8][p.fine_MW] * p.shares_MW[..., None]).sum(dim=1) for r, p in enumerate(parts)]
    torch.testing.assert_close(sum(found), whole_ME)
    torch.testing.assert_close(sum(part.weights_QM for part in parts), aligned.weights_QM)


def test_a_microbatch_is_aligned_clip_by_clip_and_not_where_a_stream_is_absent() -> None:
    views = [View("avsr", 4, 2), View("avsr", 16, 2)]
    pairs = view_pairs(views)
    counts = [[(8, 3), (5, 3)], [(2, 3), (1, 3)]]  # tokens of audio and video, by view and clip
    sequences = [
        (view, [Example([1, *[AUDIO] * a, 2, *[VIDEO] * v, 3, 9, 0], a + v + 3) for a, v in clips])
        for view, clips in zip(views, counts, strict=True)
    ]
    tokens = coarse_tokens(views, pairs, [{"audio": 13, "video": 6}, {"audio": 3, "video": 6}])
    assert tokens == {pairs[0]: 3}, "video has one rate"
    aligned = align(sequences, pairs, tokens)
    first = sum(a + v + 4 for a, v in counts[0])  # the second view begins
    assert aligned.rows_M.tolist() == [first + 1, first + 2, first + 9 + 1]
    own = [row[share > 0].tolist() for row, share in zip(aligned.fine_MW, aligned.shares_MW, strict=True)]
    assert own == [[1, 2, 3, 4], [5, 6, 7, 8], [16, 17, 18, 19]]
    np.testing.assert_allclose(aligned.weights_QM, np.full((1, 3), 1 / 3), rtol=1e-6)
    deaf = align(sequences, pairs, tokens, lambda view, clip, stream: (view, clip, stream) == (views[0], 1, "audio"))
    assert deaf.weights_QM.ne(0).tolist() == [[True, True, False]], "nothing was heard that could teach"


def test_logits_of_a_coarse_view_learn_those_of_the_fine_one_and_no_more() -> None:
    logits_LZ = torch.randn(6, 9, generator=torch.Generator().manual_seed(2)).requires_grad_()
    pairs = [ViewPair(0, 2), ViewPair(1, 2)]
    found_Q = logit_divergence(logits_LZ, 3, pairs, None)
    of_views = logits_LZ.log_softmax(dim=1).chunk(3)
    expected_Q = torch.stack(
        [F.kl_div(of_views[2], of_views[f].detach(), reduction="sum", log_target=True) for f in (0, 1)]
    )
    torch.testing.assert_close(found_Q, expected_Q)
    weights_Q = torch.tensor([0.5, 2.0])
    (gradient,) = torch.autograd.grad(found_Q @ weights_Q, logits_LZ)
    (expected,) = torch.autograd.grad(expected_Q @ weights_Q, logits_LZ)
    torch.testing.assert_close(gradient, expected)
    assert not gradient[:4].any() and gradient[4:].any()
    assert logit_divergence(logits_LZ[:2].repeat(2, 1), 2, [ViewPair(0, 1)], None).item() == 0


TAUGHT = "task.cross_rate.route_kl=0.1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.cross_rate.logit_kl=-1"], r"task\.cross_rate\.logit_kl=-1\.0: must be at least 0"),
        ([TAUGHT, "mome=none"], r"task\.cross_rate\.route_kl=0\.1 compares routers"),
        ([TAUGHT, "task.sampling=rates", "task.views_per_step=null"], r"no step has two such views"),
        ([TAUGHT, "task.views_per_step=1"], r"no step has two such views"),
        ([TAUGHT, "task=asr", "task.asr_audio_rates=[4]", "task.views_per_step=null"], r"no step has two such views"),
        (
            [TAUGHT, "llm.graphs=rehearsal", "parallel=single", "mome.dispatch=local", "data.microbatch_tokens=999"],
            r"does not go with task\.cross_rate\.route_kl=0\.1",
        ),
    ],
)
def test_what_cannot_be_taught_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_values(load_config(["experiment=tiny", *overrides]))


def test_it_is_off_by_default() -> None:
    saved: dict[str, Any] = {"llm": {"path": "x"}}
    for config in (load_config(["experiment=tiny"]), config_of(saved, None)):  # type: ignore[arg-type]
        assert not config.task.cross_rate.active
    check_values(load_config(["experiment=tiny", TAUGHT, "task.views_per_step=2"]))
