"""Routers of groups of tokens: equal ones are MoME's, others' tokens leave them alone, and decoding knows its group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mome_dist.config import load_config
from mome_dist.config.derived import router_of
from mome_dist.config.load import config_of
from mome_dist.errors import UserError
from mome_dist.evaluation.arithmetic import mome_parameters
from mome_dist.evaluation.checks import check_view
from mome_dist.model.shared import build_reference
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.routers.build import build_router
from mome_dist.moe.routers.separate import SeparateRouter
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.moe.routing import Routing
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.sequence import AUDIO
from mome_dist.speech.views import View
from mome_dist.token_context import Modality, TokenContext
from mome_dist.verification.probe import Probe, shrunk

HIDDEN, EXPERTS, TOP_K = 32, 6, 2
BY = ("rate", "task", "modality")
OVERRIDES = ["experiment=tiny", "mome/router=separate", "task.asr_audio_rates=[4,16]", "task.vsr_video_rates=[2]"]
OVERRIDES += ["task.avsr_audio_rates=[4]", "task.avsr_video_rates=[2]"]
VIEWS = ("asr(4)", "asr(16)", "vsr(2)", "avsr(4,2)")
GROUPS = {
    "rate": ["asr_4", "asr_16", "avsr_4_2", "vsr_2"],
    "task": ["asr", "avsr", "vsr"],
    "modality": ["audio", "text", "video"],
}


def _spec(by: str) -> RouterSpec:
    return router_of(load_config([*OVERRIDES, f"mome.router.by={by}"]))


def _router(by: str) -> SeparateRouter:
    router = build_router(_spec(by), HIDDEN, EXPERTS, TOP_K)
    router.initialize("mome.0", 3)
    assert isinstance(router, SeparateRouter)
    return router


def _context(*views: str) -> TokenContext:
    """Nine tokens of each view: three heard or, in VSR, seen; three seen; three of text."""
    spoken = {"asr": "aaaaaa", "vsr": "vvvvvv", "avsr": "aaavvv"}
    kinds = {"a": Modality.AUDIO, "v": Modality.VIDEO, "t": Modality.TEXT}
    modality = [kinds[kind] for view in views for kind in spoken[view.partition("(")[0]] + "ttt"]
    return TokenContext.of([(view, [9]) for view in views], modality)


def _group(by: str, view: str, kind: int) -> str:
    if by == "modality":
        return Modality(kind).name.lower()
    task, rates = view.rstrip(")").split("(")
    return task if by == "task" else "_".join((task, *rates.split(",")))


def _hidden(tokens: int) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("by", BY)
def test_each_token_has_the_matrix_of_its_group(by: str) -> None:
    router, context = _router(by), _context(*VIEWS)
    maps = {name.removeprefix("weight."): each.of(each.parameter) for each in router.trained() for name in [each.name]}
    assert list(maps) == GROUPS[by] == list(router.groups)
    hidden_NH = _hidden(context.tokens)
    logits_NE = router.logits(hidden_NH, context)
    for token in range(context.alive):
        group = _group(by, VIEWS[token // 9], int(context.modality_N[token]))
        torch.testing.assert_close(logits_NE[token], maps[group] @ hidden_NH[token])


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("views", [VIEWS, VIEWS[:1]], ids=["all views", "one view"])
def test_equal_matrices_are_the_shared_router_bit_for_bit(by: str, views: tuple[str, ...]) -> None:
    shared = TopKRouter(RouterSpec(), HIDDEN, EXPERTS, TOP_K)
    shared.initialize("mome.0", 3)
    separate, context = _router(by), _context(*views)
    with torch.no_grad():
        for each in separate.trained():
            each.of(each.parameter).copy_(shared.weight)
    hidden_NH = _hidden(context.tokens)
    one, other = shared(hidden_NH, context), separate(hidden_NH, context)
    assert torch.equal(one.logits_TE, other.logits_TE) and torch.equal(one.experts_TK, other.experts_TK)
    assert torch.equal(one.gates_TK, other.gates_TK)
    for routing in (one, other):
        (routing.gates_TK * hidden_NH[:, :TOP_K]).sum().backward()
    assert separate.packed.grad is not None and shared.weight.grad is not None
    torch.testing.assert_close(separate.packed.grad.view(-1, EXPERTS, HIDDEN).sum(dim=0), shared.weight.grad)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("views", [("asr(4)",), ("asr(4)", "asr(16)"), ("vsr(2)", "avsr(4,2)")], ids=" ".join)
def test_a_group_without_tokens_has_a_gradient_of_exact_zeros(by: str, views: tuple[str, ...]) -> None:
    router, context = _router(by), _context(*views)
    hidden_NH = _hidden(context.tokens)
    routing = router(hidden_NH, context)
    sums = routing.balance_sums(context.members_VN, True)
    ((routing.gates_TK * hidden_NH[:, :TOP_K]).sum() + sums.square().sum()).backward()
    assert router.packed.grad is not None
    kinds = context.modality_N[: context.alive].tolist()
    used = {_group(by, views[token // 9], kind) for token, kind in enumerate(kinds)}
    for group, gradient in zip(router.groups, router.packed.grad.view(-1, EXPERTS, HIDDEN), strict=True):
        assert bool(gradient.any()) == (group in used), group


@pytest.mark.parametrize(("by", "groups"), [("rate", 4), ("task", 1), ("modality", 3)])
def test_published_counts_grow_by_a_matrix_for_each_further_group(by: str, groups: int) -> None:
    config = load_config(["experiment=lrs3", f"method=mome_separate/{by}"])
    count, further = mome_parameters(config, 3072, 28), (groups - 1) * 3072 * 23 * 28
    assert count == (12_732_048, 53_596_032 + further)
    with torch.device("meta"):
        layer = LocalMoME(3072, 23, 4, 1, 12, router_of(config))
    assert 28 * sum(parameter.numel() for parameter in layer.parameters()) == count.total


def test_a_view_that_no_router_knows_is_refused() -> None:
    view = View("asr", 8, None)
    with pytest.raises(UserError, match=r"asr\(8\) needs a router that this model does not have.*asr\(4\)"):
        check_view(load_config([*OVERRIDES, "mome.router.by=rate"]), view, "rates")
    for by in ("task", "modality"):
        check_view(load_config([*OVERRIDES, f"mome.router.by={by}"]), view, "rates")


def test_a_configuration_of_before_there_was_a_choice_is_of_the_shared_router() -> None:
    assert router_of(config_of({"mome": {"score": "sigmoid"}}, Path("config.yaml"))).name == "top_k"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MoMESpeechLM]:
    folder, made = tmp_path_factory.mktemp("llama"), {}
    for by in BY:
        config = shrunk(load_config([*OVERRIDES, f"mome.router.by={by}", "llm.precision=fp32"]), folder)
        model = build_reference(config, Probe(config, 1).widths).eval()
        with torch.no_grad():
            for parameter in model.mome.parameters():
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        made[by] = model
    return made


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("by", BY)
def test_decoding_chooses_by_the_clips_view_and_the_tokens_modality(
    models: dict[str, MoMESpeechLM], by: str, beams: int
) -> None:
    model = models[by]
    module, inputs, routings = model.momes[0], list[Tensor](), list[Routing]()
    hook = module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, -2).clone()))
    module.observer = routings.append
    prefixes = [[1, 4, AUDIO, AUDIO, 5, 3], [1, 4, AUDIO, 5, 3]]
    audio = [torch.randn(8, 12), torch.randn(4, 12)]
    try:
        model.generate(prefixes, View("asr", 4, None), audio, [], eos=2, limits=[4, 4], num_beams=beams)
    finally:
        hook.remove()
        module.observer = None
    router = module.router
    maps = {each.name: each.of(each.parameter) for each in router.trained()}
    heard = torch.zeros(2, 6, dtype=torch.bool)
    heard[0, 2:4] = heard[1, 3] = True  # the shorter prefix has padding before it
    assert len(inputs) == len(routings) >= 2
    for number, (hidden_TH, routing) in enumerate(zip(inputs, routings, strict=True)):
        heard_T = heard.flatten() if number == 0 else torch.zeros(len(hidden_TH), dtype=torch.bool)
        own = {"rate": ("asr_4", "asr_4"), "task": ("asr", "asr"), "modality": ("audio", "text")}[by]
        of_heard, of_text = (hidden_TH @ maps[f"weight.{name}"].t() for name in own)
        torch.testing.assert_close(
            routing.logits_TE, torch.where(heard_T[:, None], of_heard, of_text), rtol=1e-4, atol=1e-5
        )
