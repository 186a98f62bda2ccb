"""Projectors with and without a layer norm, and mixtures of them, against closed forms and one token at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mome_dist.config import load_config
from mome_dist.config.load import config_of
from mome_dist.config.values import check_values
from mome_dist.errors import UserError
from mome_dist.planning.job import Clip, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.speech.balance import Balance, ProjectorBalance, SpeechRoutes, balance_losses
from mome_dist.speech.matryoshka import compressed_length
from mome_dist.speech.projector import Projectors
from mome_dist.speech.sequence import Absent, PackedTokens
from mome_dist.speech.views import View
from tests.gpu.counting import waits
from tests.packed import speech_tokens

FORMS = ("jejr", "dejr", "dedr")
MIXTURE: dict[str, Any] = {"experts": 4, "top_k": 2, "balance_loss": 0.3, "z_loss": 0.07}
BOTH = {"audio": 6, "video": 6}
RATES = {"audio": [2, 4], "video": [1, 3]}
HIDDEN, SIZE = 8, 16
VIEWS = [View("asr", 4, None), View("avsr", 4, 3), View("avsr", 2, 3), View("vsr", None, 1), View("asr", 4, None)]
FRAMES = [(9, 4), (3, 1), (16, 7)]  # of audio and video


def _projectors(form: str | None, widths: Mapping[str, int] = BOTH, layer_norm: bool = True) -> Projectors:
    mixture = None if form is None else {**MIXTURE, "form": form}
    module = Projectors(widths, RATES, HIDDEN, SIZE, False, "pool", layer_norm, mixture)
    module.initialize(0, 0.5)
    return module


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _named(projectors: Projectors, name: str) -> Tensor:
    return projectors.get_parameter(name).detach()


@pytest.mark.parametrize(("hidden", "expected"), [(2048, 6_295_552), (3072, 8_393_728)])
def test_a_projector_has_as_many_parameters_as_published(hidden: int, expected: int) -> None:
    for norm, layer_norm in ((0, False), (2 * hidden, True)):
        with torch.device("meta"):
            projectors = Projectors({"audio": 1024}, {"audio": [4]}, hidden, 2048, False, "pool", layer_norm)
        assert sum(parameter.numel() for parameter in projectors.parameters()) == expected + norm


@pytest.mark.parametrize(
    ("hidden", "form", "expected"),
    [
        (2048, "jejr", 25_202_688),
        (2048, "dejr", 50_401_280),
        (2048, "dedr", 50_405_376),
        (3072, "jejr", 33_603_584),
        (3072, "dejr", 67_203_072),
        (3072, "dedr", 67_207_168),
    ],
)
def test_a_mixture_has_as_many_parameters_as_published(hidden: int, form: str, expected: int) -> None:
    with torch.device("meta"):
        widths, mixture = {"audio": 1024, "video": 1024}, {**MIXTURE, "form": form}
        projectors = Projectors(widths, RATES, hidden, 2048, False, "pool", True, mixture)
    assert sum(parameter.numel() for parameter in projectors.parameters()) == expected


@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_tokens_start_at_the_size_of_embeddings(form: str | None, layer_norm: bool, scale: float) -> None:
    mixture = None if form is None else {**MIXTURE, "form": form}
    projectors = Projectors({"audio": 96}, {"audio": [1]}, 64, 256, False, "pool", layer_norm, mixture)
    projectors.initialize(0, scale)
    tokens = projectors("audio", [_random(200, 96)], 1)
    # The mean of two experts that have nothing in common has a size of at least one over the root of two.
    least = 0.9 if form is None else 0.9 / math.sqrt(2)
    assert least < tokens.square().mean().sqrt().item() / scale < 1.1


def test_without_a_layer_norm_a_projector_is_two_maps() -> None:
    projectors, clip = _projectors(None, layer_norm=False), _random(5, 6)
    w1, b1, w2, b2 = (_named(projectors, f"streams.audio.all.{n}.{k}") for n in (0, 2) for k in ("weight", "bias"))
    expected = (clip @ w1.T + b1).clamp(min=0) @ w2.T + b2
    torch.testing.assert_close(projectors("audio", [clip], 1), expected)
    assert len(list(projectors.parameters())) == 2 * 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_mixture_is_its_experts_one_token_at_a_time(form: str, layer_norm: bool) -> None:
    projectors = _projectors(form, layer_norm=layer_norm)
    for stream, clip in (("audio", _random(9, 6, seed=1)), ("video", _random(7, 6, seed=2))):
        pool = "audio_video" if form == "jejr" else stream
        router = _named(projectors, f"mixture.routers.{stream if form == 'dedr' else 'audio_video'}.weight")
        rows = []
        for token in clip:
            gates = (router @ token).softmax(0)
            best = gates.topk(2).indices.tolist()
            row = torch.zeros(HIDDEN)
            for expert in best:
                value = token
                for number in (0, 2):
                    name = f"mixture.experts.{pool}.{number}"
                    value = _named(projectors, f"{name}.weight")[expert] @ value
                    value = value + _named(projectors, f"{name}.bias")[expert]
                    value = value.clamp(min=0) if number == 0 else value
                if layer_norm:
                    value = (value - value.mean()) / (value.var(unbiased=False) + 1e-5).sqrt()
                    value = value * _named(projectors, f"mixture.experts.{pool}.3.weight")[expert]
                row += gates[expert] / gates[best].sum() * value
            rows.append(row)
        torch.testing.assert_close(projectors(stream, [clip], 1), torch.stack(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer_norm", [True, False])
@torch.no_grad()
def test_equal_experts_are_one_projector(form: str, layer_norm: bool) -> None:
    mixture, plain = _projectors(form, layer_norm=layer_norm), _projectors(None, layer_norm=layer_norm)
    for name, parameter in plain.named_parameters():
        _, stream, _, rest = name.split(".", 3)
        source = plain.get_parameter(f"streams.audio.all.{rest}") if form == "jejr" else parameter
        pool = "audio_video" if form == "jejr" else stream
        mixture.get_parameter(f"mixture.experts.{pool}.{rest}").copy_(source.expand(4, *source.shape))
    for stream in BOTH:
        clips = [_random(11, 6, seed=1), _random(3, 6, seed=2)]
        expected = plain("audio" if form == "jejr" else stream, clips, 2)
        torch.testing.assert_close(mixture(stream, clips, 2), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_tied_pools_and_routers_join_streams() -> None:
    joint, *others = (_projectors(form) for form in FORMS)
    for other in others:
        for name, parameter in other.named_parameters():
            _, kind, owner, rest = name.split(".", 3)
            assert owner in ("audio", "video", "audio_video")
            parameter.copy_(joint.get_parameter(f"mixture.{kind}.audio_video.{rest}"))
        for stream in BOTH:
            clips = [_random(11, 6, seed=1), _random(3, 6, seed=2)]
            torch.testing.assert_close(other(stream, clips, 2), joint(stream, clips, 2), rtol=0, atol=0)


@pytest.mark.parametrize("stream", BOTH)
def test_forms_of_one_stream_are_one(stream: str) -> None:
    first, *others = (_projectors(form, {stream: 6}) for form in FORMS)
    for other in others:
        assert list(other.state_dict()) == list(first.state_dict())
        assert torch.equal(other(stream, [_random(9, 6)], 2), first(stream, [_random(9, 6)], 2))


def test_streams_of_unequal_width_have_routers_of_their_own() -> None:
    assert _projectors("dedr", {"audio": 6, "video": 5}).supports("video", 7)
    for form in ("jejr", "dejr"):
        with pytest.raises(ValueError, match="widths differ"):
            _projectors(form, {"audio": 6, "video": 5})


def _tokens(absent: Absent | None) -> PackedTokens:
    return speech_tokens(VIEWS, FRAMES, absent)


def _features(seed: int = 0) -> dict[str, list[Tensor]]:
    return {
        stream: [_random(frames[number], 6, seed=seed + 10 * clip + number) for clip, frames in enumerate(FRAMES)]
        for number, stream in enumerate(BOTH)
    }


def _left_out(view: View, clip: int, stream: str) -> bool:
    missing = {("avsr", 4): [(0, "audio"), (2, "video")], ("avsr", 2): [(0, "audio"), (0, "video")]}
    return (clip, stream) in missing.get((view.task, view.audio_rate or 0), [])


def _expected_losses(projectors: Projectors, ranks: Sequence[Mapping[str, Sequence[Tensor]]], absent: Absent) -> Tensor:
    """The losses of the clips of all ranks, one view, router and token after the other."""
    mixture = projectors.mixture
    assert mixture is not None
    total = torch.zeros(())
    for view, router in itertools.product(VIEWS, mixture.routers):
        logits = []
        for stream, rate in (("audio", view.audio_rate), ("video", view.video_rate)):
            if rate is None or mixture.router_of[stream] != router:
                continue
            for clip, frames in itertools.chain.from_iterable(enumerate(features[stream]) for features in ranks):
                if not absent(view, clip, stream):
                    for number in range(compressed_length(len(frames), rate)):
                        token = frames[number * rate : (number + 1) * rate].mean(dim=0)
                        logits.append(projectors.get_parameter(f"mixture.routers.{router}.weight") @ token)
        if logits:
            probs_TE = torch.stack(logits).softmax(dim=-1)
            chosen_TK = probs_TE.topk(2).indices
            share_E = torch.tensor([(chosen_TK == expert).sum() for expert in range(4)]) / len(logits)
            assert share_E.sum().item() == pytest.approx(2)
            z = torch.stack([each.exp().sum().log() ** 2 for each in logits]).mean()
            total = total + 0.3 * 4 * (share_E * probs_TE.mean(dim=0)).sum() + 0.07 * z
    return total / len(VIEWS)


def _losses(projectors: Projectors, features: Mapping[str, Sequence[Tensor]], absent: Absent | None) -> Tensor:
    kept: list[SpeechRoutes] = []

    def keep(tokens_TH: Tensor, routes: Sequence[SpeechRoutes]) -> Tensor:
        kept.extend(routes)
        return tokens_TH

    tokens = _tokens(absent)
    projectors.insert(torch.zeros(tokens.context.tokens, HIDDEN), tokens.speech, features, keep)
    assert projectors.mixture is not None
    return balance_losses(projectors.mixture, kept)


@pytest.mark.parametrize("absent", [None, _left_out], ids=["all", "some absent"])
@pytest.mark.parametrize("form", FORMS)
def test_losses_are_those_of_each_view(form: str, absent: Absent | None) -> None:
    projectors, features = _projectors(form), _features()
    expected = _expected_losses(projectors, [features], absent or (lambda *_: False))
    torch.testing.assert_close(_losses(projectors, features, absent), expected)


def test_the_balance_loss_is_the_experts_of_a_token_at_perfect_balance() -> None:
    projectors = _projectors("jejr")
    mixture = projectors.mixture
    assert mixture is not None
    mixture.z_loss, mixture.balance_loss = 0.0, 1.0
    with torch.no_grad():
        projectors.get_parameter("mixture.routers.audio_video.weight").zero_()
    # Every expert is as probable as the others, so that it does not matter which ones are chosen.
    assert _losses(projectors, _features(), None).item() == pytest.approx(2)


class _TwoRanks:
    """In the place of `torch.distributed`: sums what this rank has with what the other one has."""

    def __init__(self) -> None:
        self.other: list[Tensor] = []
        self.sent: list[Tensor] = []

    def get_world_size(self, group: object) -> int:
        return 2

    def all_reduce(self, counts: Tensor, group: object, async_op: bool) -> None:
        self.sent.append(counts.clone())
        if self.other:
            counts += self.other.pop(0)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_in_training_are_those_of_the_losses_of_all_ranks(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    share, ranks, tokens = 0.4, [_features(), _features(seed=100)], _tokens(_left_out)
    network, found, sums = _TwoRanks(), [], []
    monkeypatch.setattr("mome_dist.moe.load.dist", network)

    def gradients(features: Mapping[str, Sequence[Tensor]]) -> tuple[dict[str, Any], dict[str, float]]:
        """The losses of a rank's part, and those of the routes of both ranks."""
        projectors = _projectors(form)
        assert projectors.mixture is not None
        balance = ProjectorBalance(projectors.mixture, network)  # type: ignore[arg-type]
        output_NH = projectors.insert(
            torch.zeros(tokens.context.tokens, HIDDEN),
            tokens.speech,
            features,
            balance.of_pass(tokens.context.view_names, share),
        )
        (0 * output_NH).sum().backward()
        balance.settle()
        return {n: p.grad for n, p in projectors.named_parameters() if "routers" in n}, balance.take_shares()

    for number, features in enumerate(ranks):
        network.other, network.sent = [], []
        gradients(ranks[1 - number])
        network.other = network.sent
        part, shares = gradients(features)
        found.append(part)
        sums.append(shares)
    projectors = _projectors(form)
    (share * _expected_losses(projectors, ranks, _left_out)).backward()
    for name, mine in found[0].items():
        gradient: Any = projectors.get_parameter(name).grad
        torch.testing.assert_close(mine + found[1][name], gradient, rtol=1e-5, atol=1e-7)
        assert gradient.abs().max() > 1e-3
    assert sums[0] == sums[1]
    routers = {name.partition(".")[0] for name in sums[0]}
    assert routers == ({"audio", "video"} if form == "dedr" else {"audio_video"})
    for router in routers:
        assert sum(value for name, value in sums[0].items() if name.startswith(f"{router}.")) == pytest.approx(1)


def test_a_balanced_pass_changes_no_token() -> None:
    projectors, tokens = _projectors("dedr"), _tokens(None)
    assert projectors.mixture is not None
    balance = ProjectorBalance(projectors.mixture, None)  # type: ignore[arg-type]
    zeros_NH = torch.zeros(tokens.context.tokens, HIDDEN)
    found = [
        projectors.insert(zeros_NH, tokens.speech, _features(), each)
        for each in (None, balance.of_pass(tokens.context.view_names, 1.0))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("form", FORMS)
def test_a_mixture_makes_the_host_wait_no_more_than_one_projector(form: str) -> None:
    tokens, counts = _tokens(_left_out), []
    for projectors in (_projectors(form), _projectors(None)):
        balance = None
        if projectors.mixture is not None:
            of_ranks = ProjectorBalance(projectors.mixture, None)  # type: ignore[arg-type]
            balance = of_ranks.of_pass(tokens.context.view_names, 1.0)

        def run(projectors: Projectors = projectors, balance: Balance | None = balance) -> None:
            zeros_NH = torch.zeros(tokens.context.tokens, HIDDEN)
            projectors.insert(zeros_NH, tokens.speech, _features(), balance).sum().backward()

        counts.append(waits(torch.device("cpu"), run))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("form", [None, "dedr"])
def test_a_plan_counts_what_is_built_and_kept(form: str | None, layer_norm: bool) -> None:
    mixture = "null" if form is None else f"{{form: {form}, experts: 3}}"
    overrides = [f"projector.layer_norm={layer_norm}", f"projector.mixture={mixture}", "projector.hidden_size=40"]
    config = load_config(["task=asr", *overrides])
    shape = replace(find_shape("llama-3.1-8b"), hidden_size=24)
    job = job_of(config, shape, Clip(), {"audio": 20}, on_gpu=False)
    settings = None if form is None else {**MIXTURE, "form": form, "experts": 3}
    projectors = Projectors({"audio": 20}, {"audio": [1]}, 24, 40, False, "pool", layer_norm, settings)
    projectors.initialize(0, 1.0)
    assert job.projector_parameters == sum(parameter.numel() for parameter in projectors.parameters())
    held = {parameter.untyped_storage().data_ptr() for parameter in projectors.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    clip = _random(500, 20)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        projectors("audio", [clip], 1)
    # Beside them what the router keeps: some numbers for each expert.
    assert job.projector_values <= sum(saved.values()) / 500 <= job.projector_values + (0 if form is None else 30) + 4


def test_a_saved_run_without_the_keys_has_a_layer_norm_and_no_mixture() -> None:
    config = config_of({"projector": {"hidden_size": 7}}, Path("config.yaml"))
    assert config.projector.layer_norm and config.projector.mixture is None


STACKED = ["projector.compression=stack", "task=avsr", "task.avsr_audio_rates=[4]"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["projector.mixture.form=moe"], r"projector.mixture.form='moe': choose from dedr, dejr, jejr"),
        (["projector.mixture.top_k=5"], r"projector.mixture.top_k=5: must be from 2 to projector.mixture.experts=4"),
        (["projector.mixture.top_k=1"], r"projector.mixture.top_k=1: must be from 2 .* teaches a router nothing"),
        (["projector.mixture.z_loss=-1"], r"projector.mixture.z_loss=-1.0: must be at least 0"),
        (["projector.per_rate=true"], r"exclude each other.* Set projector.per_rate=false, or projector.mixture=null"),
        (STACKED, r"the tasks read video at rates \[2, 5\]: set projector.compression=pool, or one rate a stream"),
    ],
)
def test_what_a_mixture_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_values(load_config(["projector=smop", *overrides]))


def test_a_mixture_stacks_at_one_rate() -> None:
    check_values(load_config(["projector=smop", *STACKED, "task.avsr_video_rates=[2]"]))
    mixture = {**MIXTURE, "form": "jejr"}
    projectors = Projectors({"audio": 3, "video": 6}, {"audio": [4], "video": [2]}, 8, 5, False, "stack", True, mixture)
    projectors.initialize(0, 1.0)
    assert projectors("audio", [_random(9, 3)], 4).shape == (2, 8)
    assert projectors.supports("audio", 4) and not projectors.supports("audio", 2)


def test_a_key_of_a_section_that_is_null_is_told_from_an_unknown_one() -> None:
    with pytest.raises(UserError, match=r"projector.mixture is null here: set 'projector.mixture={form: \.\.\.}'"):
        load_config(["projector.mixture.form=jejr"])
    with pytest.raises(
        UserError, match=r"unknown .*'projector.mixture.expert'; did you mean projector.mixture.experts"
    ):
        load_config(["projector=smop", "projector.mixture.expert=3"])
