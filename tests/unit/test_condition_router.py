"""The router that knows its utterance: without it MoME's, the same shift for all tokens, the same text in decoding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mome_dist.config import load_config
from mome_dist.config.derived import router_of
from mome_dist.config.values import check_values
from mome_dist.errors import UserError
from mome_dist.model.shared import build_reference
from mome_dist.moe.balance import batch_sums
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.routers.build import build_router
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.moe.routing import Routing
from mome_dist.speech.sequence import AUDIO
from mome_dist.speech.views import View
from mome_dist.token_context import Modality, OneView, TokenContext
from mome_dist.verification.probe import Probe, shrunk

HIDDEN, EXPERTS, TOP_K = 24, 24, 4
BY = ("rate", "task", "modality", "utterance")
VIEWS = ["task.asr_audio_rates=[4,16]", "task.vsr_video_rates=[2]", "task.avsr_audio_rates=[4]"]
VIEWS += ["task.avsr_video_rates=[2]"]
SPEECH, TEXT = 4, 3


def _spec(*by: str, **settings: float) -> RouterSpec:
    own = [f"mome.router.{key}={value}" for key, value in settings.items()]
    config = load_config(["experiment=tiny", "mome/router=condition", *VIEWS, f"mome.router.by=[{','.join(by)}]", *own])
    check_values(config)
    return router_of(config)


def _router(*by: str, shifted: bool = True, **settings: float) -> Any:
    router = build_router(_spec(*by, **settings), HIDDEN, EXPERTS, TOP_K)
    router.initialize("mome.0", 3)
    return _shifted(router) if shifted else router


@torch.no_grad()
def _shifted(router: Any) -> Any:
    for name, parameter in router.named_parameters():
        if name.startswith("shift_"):
            parameter.normal_(generator=torch.Generator().manual_seed(7))
    return router


def _context(*views: str) -> TokenContext:
    """Make an utterance of each view: a tag, speech that was heard or, in VSR, seen, and text."""
    modality = []
    for view in views:
        kind = Modality.VIDEO if view.startswith("vsr") else Modality.AUDIO
        modality += [Modality.TEXT, *[kind] * SPEECH, *[Modality.TEXT] * TEXT]
    return TokenContext.of([(view, [1 + SPEECH + TEXT]) for view in views], modality)


def _hidden(tokens: int) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("by", [BY[:1], BY[1:2], BY[2:3], BY[3:], BY], ids=" ".join)
def test_it_starts_as_the_shared_router_bit_for_bit(by: tuple[str, ...]) -> None:
    shared, router = TopKRouter(RouterSpec(), HIDDEN, EXPERTS, TOP_K), _router(*by, shifted=False)
    shared.initialize("mome.0", 3)
    context = _context("asr(4)", "vsr(2)")
    hidden_NH = _hidden(context.tokens)
    one, other = shared(hidden_NH, context), router(hidden_NH, context)
    for name in ("logits_TE", "experts_TK", "gates_TK", "probs_TE"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    other.gates_TK[:, 0].sum().backward()
    for name in by:
        gradient = router.get_parameter(f"shift_{name}").grad
        assert gradient is not None and gradient.any(), "nothing would ever be learned"


def test_all_tokens_of_an_utterance_have_the_same_shift() -> None:
    router, context = _router("rate", "task", "utterance"), _context("asr(4)", "asr(16)", "vsr(2)")
    hidden_NH = _hidden(context.tokens)
    shifts = (router.logits(hidden_NH, context) - hidden_NH @ router.weight.t())[: context.alive].split(context.lengths)
    for number, shift_SE in enumerate(shifts):
        speech_SH = hidden_NH[sum(context.lengths[:number]) + 1 :][:SPEECH]
        expected_E = router.shift_utterance @ speech_SH.mean(dim=0)
        rate, task = ("asr_16", "asr_4", "avsr_4_2", "vsr_2"), ("asr", "avsr", "vsr")
        own = context.view_names[number].replace("(", "_").rstrip(")")
        of_rate, of_task = _embeddings(router, "rate"), _embeddings(router, "task")
        expected_E = expected_E + router.shift_rate @ of_rate[sorted(rate, key=_order).index(own)]
        expected_E = expected_E + router.shift_task @ of_task[task.index(own.partition("_")[0])]
        torch.testing.assert_close(shift_SE, expected_E.expand_as(shift_SE))


def _embeddings(router: Any, by: str) -> Tensor:
    """[G, D]."""
    return router.get_parameter(f"embedding_{by}").view(-1, router.settings.width)


def _order(name: str) -> tuple[str, list[int]]:
    task, *rates = name.split("_")
    return task, [int(rate) for rate in rates]


def test_by_modality_the_shift_is_that_of_the_token() -> None:
    router, context = _router("modality"), _context("asr(4)", "vsr(2)")
    hidden_NH = _hidden(context.tokens)
    shift_NE = (router.logits(hidden_NH, context) - hidden_NH @ router.weight.t())[: context.alive]
    table_GE = _embeddings(router, "modality") @ router.shift_modality.t()
    names = [Modality(kind).name.lower() for kind in context.modality_N[: context.alive].tolist()]
    rows = [("audio", "text", "video").index(name) for name in names]
    torch.testing.assert_close(shift_NE, table_GE[rows])


def test_an_utterance_is_the_same_whatever_lies_beside_it_and_has_no_speech_without_tokens() -> None:
    router, context = _router("utterance"), _context("asr(4)", "asr(4)", "vsr(2)")
    hidden_NH, own = _hidden(context.tokens), context.lengths[0]
    others_NH = torch.cat([hidden_NH[:own], 9 * hidden_NH[own:]])
    one_NE, other_NE = (router.logits(each, context) for each in (hidden_NH, others_NH))
    assert torch.equal(one_NE[:own], other_NE[:own]) and not torch.equal(one_NE[own:], other_NE[own:])
    alone = TokenContext.of([("asr(4)", [own])], context.modality_N[:own], multiple=1)
    torch.testing.assert_close(router.logits(hidden_NH[:own], alone), one_NE[:own])
    words = TokenContext.of([("asr(4)", [own])], multiple=1)
    torch.testing.assert_close(router.logits(hidden_NH[:own], words), hidden_NH[:own] @ router.weight.t())
    dead_NE = one_NE[context.alive :]
    torch.testing.assert_close(dead_NE, hidden_NH[context.alive :] @ router.weight.t())


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_written_text_has_the_means_of_its_prefix(beams: int) -> None:
    """Two utterances decoded side by side, the shorter one padded on the left, are what they are as whole sequences."""
    module = LocalMoME(HIDDEN, EXPERTS, TOP_K, 1, 3, _spec("utterance", "task"))
    module.initialize("mome.0", 3)
    _shifted(module.router)
    assert isinstance(module.routed.up_weight, Tensor)
    module.routed.up_weight.normal_(generator=torch.Generator().manual_seed(1))
    lengths, before = (1 + SPEECH, SPEECH - 1), 1 + SPEECH
    kinds = [[Modality.TEXT, *[Modality.AUDIO] * (length - 1), *[Modality.TEXT] * TEXT] for length in lengths]
    whole = TokenContext.of([("asr(4)", [length + TEXT for length in lengths])], [*kinds[0], *kinds[1]], multiple=1)
    hidden_NH = _hidden(whole.tokens)
    expected = module.train()(hidden_NH, None, whole).split(whole.lengths)
    module.eval()
    sequences = hidden_NH.split(whole.lengths)
    prefix_BSH, modality_BS = torch.ones(2, before, HIDDEN), torch.zeros(2, before, dtype=torch.int8)
    for row, (length, kind) in enumerate(zip(lengths, kinds, strict=True)):
        prefix_BSH[row, before - length :] = sequences[row][:length]
        modality_BS[row, before - length :] = torch.tensor(kind[:length])
    read = module(prefix_BSH, None, OneView("asr(4)", modality_BS.flatten(), 2 * before, 2))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(read[row, before - length :], expected[row][:length], rtol=1e-5, atol=1e-5)
    for place in range(TEXT):
        rows = [each[length + place] for each, length in zip(sequences, lengths, strict=True)]
        text_B1H = torch.stack(rows)[:, None].repeat_interleave(beams, dim=0)
        written = module(text_B1H, None, OneView("asr(4)", None, 0))
        for row in range(2 * beams):
            own = expected[row // beams][lengths[row // beams] + place]
            torch.testing.assert_close(written[row, 0], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_writes_with_the_means_of_what_each_clip_says(beams: int, tmp_path: Path) -> None:
    words = ["experiment=tiny", "mome/router=condition", "mome.router.by=[utterance]", "llm.precision=fp32", *VIEWS]
    config = shrunk(load_config(words), tmp_path)
    model = build_reference(config, Probe(config, 1).widths).eval()
    module, inputs, routings = model.momes[0], list[Tensor](), list[Routing]()
    with torch.no_grad():
        for parameter in model.mome.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, -2).clone()))
    module.observer = routings.append
    prefixes = [[1, 4, AUDIO, AUDIO, 5, 3], [1, 4, AUDIO, 5, 3]]
    audio = [torch.randn(8, 12), torch.randn(4, 12)]
    model.generate(prefixes, View("asr", 4, None), audio, [], eos=2, limits=[4, 4], num_beams=beams)
    router: Any = module.router
    read_BSH = inputs[0].view(2, 6, -1)  # the shorter prefix has padding before it
    means_BH = torch.stack([read_BSH[0, 2:4].mean(dim=0), read_BSH[1, 3]])
    assert len(inputs) == len(routings) >= 2
    for hidden_TH, routing in zip(inputs, routings, strict=True):
        own_TH = means_BH.repeat_interleave(len(hidden_TH) // 2, dim=0)
        expected_TE = hidden_TH @ router.weight.t() + own_TH @ router.shift_utterance.t()
        torch.testing.assert_close(routing.logits_TE, expected_TE, rtol=1e-4, atol=1e-5)


def test_losses_in_closed_form() -> None:
    even_TE, sure_TE = torch.zeros(EXPERTS, EXPERTS), 99 * torch.eye(EXPERTS)
    for logits_TE, sparsity, importance in (
        (even_TE, math.sqrt(EXPERTS), 1.0),
        (sure_TE, 1.0, 1.0),
        (sure_TE[:1].repeat(EXPERTS, 1), 1.0, float(EXPERTS)),
    ):
        router = _router("rate", sparsity_loss=0.5, importance_loss=0.25)
        routing = router.route(logits_TE, None)
        (loss,) = router.losses(routing)
        assert loss.coefficient == 0.5
        torch.testing.assert_close(loss.values_T, torch.full((EXPERTS,), sparsity))
        sums = batch_sums([routing.restricted_to(torch.ones(EXPERTS, dtype=torch.bool))])
        assert float(router.batch_loss(*sums)) == pytest.approx(0.25 * importance, rel=1e-5)
    without = _router("rate")
    assert not without.has_losses and not without.has_batch_loss and without.kernel_form is not None
    assert without.losses(without.route(even_TE, None)) == ()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mome.router.by=[]", r"mome\.router\.by=\[\]: name at least one of rate, task, modality, utterance"),
        ("mome.router.by=[rate,rate]", r"none twice"),
        ("mome.router.by=[accent]", r"mome\.router\.by='accent': choose from rate, task, modality, utterance"),
        ("mome.router.width=0", r"mome\.router\.width=0: set 1 or more"),
        ("mome.router.sparsity_loss=-1", r"mome\.router\.sparsity_loss=-1\.0: set 0 or more"),
        ("mome.score=sigmoid", r"mome\.score=sigmoid does not go with mome\.router\.name=condition"),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_values(load_config(["experiment=tiny", "mome/router=condition", setting]))
