"""What is wrong with a request for text, told before anything heavy is imported or loaded. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from mome_dist.config.derived import llm_terms_of, rates_of, router_of, streams_of, views_of
from mome_dist.config.models import config_of_trained, is_rank
from mome_dist.config.schema import DecodingConfig, RunConfig
from mome_dist.config.values import check_decoding
from mome_dist.data.corpus import Corpus
from mome_dist.data.noise import BABBLE
from mome_dist.errors import UserError, no_folder
from mome_dist.evaluation.conditions import CLEAN, Condition, conditions_of
from mome_dist.evaluation.request import EvaluationRequest, check_baselines, names_of, parse_views, ratios_of
from mome_dist.speech.views import View, streams_read
from mome_dist.trained import CHECKPOINT, EXPORT, Trained, count_of_average, find_trained


def check_request(request: EvaluationRequest) -> None:
    """Check all of a request that needs no model.

    Raises:
        UserError: naming the first wrong key, and the fix.
    """
    if not request.checkpoint:
        raise UserError("nothing is named: give a run, a checkpoint of it, or an export (checkpoint=DIR).")
    check_baselines(request.baselines)
    conditions = asked_conditions(request)
    averaged = count_of_average(request.select)
    found = find_trained(request.checkpoint)
    config = config_of_trained(found)
    decoding_of(config.decoding, request)
    if request.limit is not None and request.limit < 1:
        raise UserError(f"limit={request.limit} must be at least 1.")
    views = None if request.rates is None else parse_views(request.rates)
    for condition in conditions:
        if condition.noise not in (None, BABBLE) and not Path(condition.noise).is_dir():
            raise UserError(
                f"noise={condition.noise} {no_folder(condition.noise)}; name {CLEAN}, {BABBLE} or a directory of "
                "recordings."
            )
    if found.kind != "run" and (averaged is not None or request.select == "best"):
        raise UserError(f"select={request.select} needs the directory of a run, and {found.directory} is none.")
    check_output(found, request.output)
    for view in views or []:
        check_view(config, view, "rates")
        if view not in views_of(config) and not request.untrained_rates:
            raise UserError(
                f"rates: {view} was not trained; trained are {_listed(views_of(config))}. If you mean it, add "
                "untrained_rates=true."
            )
    if not is_rank():
        _check_corpus(request, config)


def check_view(config: RunConfig, view: View, key: str) -> None:
    """Check that a model of a configuration can read a view, whether it trained on it or not.

    Args:
        key: what the view was given by, for the message.

    Raises:
        UserError: it has no projector for a stream or its rate, or not all low-rank terms or no router of the view.
    """
    trained = f"it was trained on {_listed(views_of(config))}"
    for stream in streams_read([view]):
        if stream not in streams_of(config):
            raise UserError(f"{key}: {view} needs {stream}, but this model was trained without {stream}; {trained}.")
        rate = getattr(view, f"{stream}_rate")
        if config.projector.per_rate and rate not in rates_of(config)[stream]:
            raise UserError(
                f"{key}: {view} needs this model to project {stream} at rate {rate}; it has a projector per rate: "
                f"{trained}."
            )
    terms = None if config.llm.lora is None else llm_terms_of(config, config.llm.lora.reduction or 1)
    if terms is not None and not terms.has(view):
        raise UserError(f"{key}: {view} needs low-rank terms that this model's LLM does not have; {trained}.")
    if config.mome.experts and not router_of(config).covers(view):
        raise UserError(f"{key}: {view} needs a router that this model does not have; {trained}.")


def asked_conditions(request: EvaluationRequest) -> list[Condition]:
    """What the clips of an evaluation go through. Raises UserError, naming the key."""
    corruptions = names_of("video_corruption", request.video_corruption)
    return conditions_of(names_of("noise", request.noise), ratios_of(request.snr), corruptions)


def decoding_of(config: DecodingConfig, request: EvaluationRequest) -> DecodingConfig:
    """The run's decoding settings with those of the request over them, checked."""
    asked = {field.name: getattr(request, field.name) for field in fields(config)}
    decoding = replace(config, **{key: value for key, value in asked.items() if value is not None})
    check_decoding(decoding)
    return decoding


def check_output(found: Trained, output: str | None) -> None:
    """Raise UserError where no run says where results go, and the request does not either."""
    if output:
        return
    if found.kind == EXPORT or (found.kind == CHECKPOINT and found.directory.resolve().parent.name != "checkpoints"):
        raise UserError(
            f"checkpoint={found.directory} is not in a run directory; say with output=DIR where results go."
        )


def _check_corpus(request: EvaluationRequest, config: RunConfig) -> None:
    corpus = Corpus.open(request.corpus or config.data.corpus)
    corpus.split(request.split or config.data.test_split)


def _listed(views: Sequence[View]) -> str:
    return ", ".join(map(str, views))
