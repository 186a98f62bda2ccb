"""Arguments of the evaluation and report commands."""

from __future__ import annotations

import pytest

from mome_dist.errors import UserError
from mome_dist.evaluation.request import EvaluationRequest, check_baselines, parse_request, parse_views
from mome_dist.speech.views import View


def test_views_survive_the_commas_of_yaml() -> None:
    request = parse_request(EvaluationRequest, ["checkpoint=runs/x", "rates=[asr(4),avsr(16,5),vsr(2)]", "limit=3"])
    assert parse_views(request.rates) == [View("asr", 4, None), View("avsr", 16, 5), View("vsr", None, 2)]
    assert (request.checkpoint, request.limit, request.num_beams) == ("runs/x", 3, None)


def test_one_view_and_repeated_views() -> None:
    assert parse_views("asr(8)") == [View("asr", 8, None)]
    assert parse_views("asr(8), asr(8),avsr(4, 2)") == [View("asr", 8, None), View("avsr", 4, 2)]


@pytest.mark.parametrize(
    "text", ["asr", "asr()", "asr(4,2)", "avsr(4)", "vsr(0)", "avsr(4,0)", "tts(4)", "asr(4)vsr(2)", "", "asr(-1)", "x"]
)
def test_wrong_views_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="rates"):
        parse_views(text)


@pytest.mark.parametrize(("argument", "named"), [("rate=4", "rate"), ("limit=many", "limit"), ("limit", "key=value")])
def test_wrong_arguments_are_named(argument: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_request(EvaluationRequest, ["checkpoint=runs/x", argument])


@pytest.mark.parametrize("first", ["runs/x=1", "run=runs/x=1", "checkpoint=runs/x=1"])
def test_what_is_evaluated_comes_first_alone_or_by_key(first: str) -> None:
    request = parse_request(EvaluationRequest, [first, "limit=3"])
    assert (request.checkpoint, request.limit) == ("runs/x=1", 3)


def test_baselines() -> None:
    request = parse_request(EvaluationRequest, ["baselines=[chance,untrained]"])
    check_baselines(request.baselines)
    assert request.baselines == ["chance", "untrained"]
    with pytest.raises(UserError, match="oracle"):
        check_baselines(["oracle"])
