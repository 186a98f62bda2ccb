"""Low-rank terms of the LLM: which there are, how many parameters they have, and what they compute in one process."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mome_dist.adapters.lora import LayerLoRA, initial_factor
from mome_dist.adapters.tensor_parallel import TensorParallelLoRA, TermsOfTokens
from mome_dist.adapters.terms import LowRankTerms
from mome_dist.config import RunConfig, load_config
from mome_dist.config.derived import check_llm_terms, llm_terms_of
from mome_dist.config.values import check_values
from mome_dist.engine.deepspeed_names import ModelTensors
from mome_dist.errors import UserError
from mome_dist.evaluation.arithmetic import llm_lora_parameters
from mome_dist.evaluation.decoding import check_view
from mome_dist.evaluation.lora_plots import product_norm
from mome_dist.llm.shape import LLMShape
from mome_dist.model.shared import build_reference
from mome_dist.parallel.layout import Layout
from mome_dist.planning.flops import step_flops
from mome_dist.planning.job import Clip, held_parameters, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.speech.projector import Projectors
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.views import View
from mome_dist.verification.probe import Probe, shrunk, wake_reference

OMNI = [View("asr", 4, None), View("asr", 16, None), View("vsr", None, 2), View("avsr", 4, 2), View("avsr", 16, 2)]
VIEWS = [
    "task.asr_audio_rates=[4]",
    "task.vsr_video_rates=[2]",
    "task.avsr_audio_rates=[4,16]",
    "task.avsr_video_rates=[5]",
]


def _terms(*kinds: str, views: list[View] = OMNI, rank: int = 2, start: str = "a_random") -> LowRankTerms:
    return LowRankTerms(rank, 0.125, start, kinds, tuple(views))


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        (["shared"], ["shared"]),
        (["task"], ["asr", "avsr", "vsr"]),
        (["rates"], ["asr_4", "asr_16", "avsr_4_2", "avsr_16_2", "vsr_2"]),
        (["shared", "task"], ["asr", "avsr", "shared", "vsr"]),
    ],
)
def test_terms_follow_from_the_views(kinds: list[str], names: list[str]) -> None:
    assert _terms(*kinds).names == names


def test_a_view_uses_its_own() -> None:
    terms = _terms("rates", "shared")
    assert terms.of(View("avsr", 16, 2)) == ["avsr_16_2", "shared"] and terms.of(View("vsr", None, 2))[0] == "vsr_2"
    assert terms.has(View("asr", 4, None)) and not terms.has(View("asr", 5, None))
    assert _terms("task").has(View("asr", 5, None)) and not _terms("task", views=OMNI[:2]).has(View("vsr", None, 2))


# Published sizes, and what follows from the sizes of the LLMs: layers, hidden size, width of values.
PARAMETERS = [
    (16, 2048, 512, 32, 64, 6_815_744),  # Llama 3.2 1B
    (28, 3072, 1024, 32, 96, 27_525_120),  # 3B
    (32, 4096, 1024, 64, 64, 27_262_976),  # Llama 3.1 8B
    (24, 896, 128, 32, 28, 1_892_352),  # Qwen2.5 0.5B
    (28, 1536, 256, 32, 48, 6_537_216),  # 1.5B
    (36, 2048, 256, 32, 64, 14_745_600),  # 3B
    (28, 3584, 512, 32, 112, 35_323_904),  # 7B
    (48, 5120, 1024, 32, 160, 125_829_120),  # 14B
    (64, 5120, 1024, 32, 160, 167_772_160),  # 32B
    (30, 576, 192, 32, 18, 1_036_800),  # SmolLM2 135M
    (30, 576, 192, 16, 36, 2_073_600),
    (30, 576, 192, 8, 72, 4_147_200),
]


@pytest.mark.parametrize(("layers", "hidden", "values", "reduction", "rank", "expected"), PARAMETERS)
def test_parameters_are_those_of_the_papers(
    layers: int, hidden: int, values: int, reduction: int, rank: int, expected: int
) -> None:
    config = load_config([f"llm.lora={{reduction: {reduction}}}"])
    terms = llm_terms_of(config, hidden)
    assert terms is not None and terms.rank == rank
    with torch.device("meta"):
        built = nn.ModuleList([LayerLoRA(terms, hidden, hidden, values) for _ in range(layers)])
    assert sum(parameter.numel() for parameter in built.parameters()) == expected
    assert layers * terms.parameters(hidden, hidden, values) == expected


def _probe(folder: Path, lora: str) -> Probe:
    settings = ["experiment=tiny", "llm.precision=fp32", "mome=none", "parallel=single", *VIEWS]
    return Probe(shrunk(load_config([*settings, f"llm.lora={lora}"]), folder), steps=1)


@pytest.mark.parametrize(
    ("kinds", "active", "total"), [("shared", 1, 1), ("rates", 1, 4), ("shared, rates", 2, 5), ("shared, task", 2, 4)]
)
def test_reports_and_plans_count_what_is_built(tmp_path: Path, kinds: str, active: int, total: int) -> None:
    probe = _probe(tmp_path, f"{{rank: 4, terms: [{kinds}]}}")
    config, shape = (
        load_config(["mome=none", *VIEWS, f"llm.lora={{reduction: 32, terms: [{kinds}]}}"]),
        find_shape("llama-3.2-3b"),
    )
    config.task.tasks = probe.config.task.tasks
    assert llm_lora_parameters(config, shape) == (active * 27_525_120, total * 27_525_120)
    job = job_of(config, shape, Clip(), probe.widths, on_gpu=True)
    without = dataclasses.replace(job, terms=None)
    assert job.trained_parameters - without.trained_parameters == total * 27_525_120
    needed, tokens = step_flops(job), sum(job.lengths) * job.batch_size * job.views_per_step / len(job.lengths)
    assert needed["terms"] == pytest.approx(6 * tokens * active * 27_525_120) and needed["llm"] > 10 * needed["terms"]
    layout = Layout.for_world(4, tp=4, sequence_parallel=True)
    held, _, partial = held_parameters(job, layout, 28, first_stage=True)
    a, b = total * 28 * 96 * 2 * 3072, total * 28 * 96 * (3072 + 1024)
    assert held - held_parameters(without, layout, 28, first_stage=True)[0] == a + b / 4 and partial == a
    small = LLMShape.from_directory(probe.config.llm.path)
    assert (
        build_reference(probe.config, probe.widths).part_sizes()["llm_lora"]
        == llm_lora_parameters(probe.config, small).total
    )


def _model(probe: Probe) -> MoMESpeechLM:
    return build_reference(probe.config, probe.widths).eval()


@torch.no_grad()
def _logits(model: MoMESpeechLM, probe: Probe) -> Tensor:
    batch = probe.microbatch(range(3))
    return model.label_logits(batch.tokens, batch.features)


@pytest.mark.parametrize("start", ["a_random", "b_random"])
def test_a_run_begins_as_the_frozen_llm(tmp_path: Path, start: str) -> None:
    probe = _probe(tmp_path, f"{{rank: 4, start: {start}, terms: [shared, rates]}}")
    adapted = _model(probe)
    config = copy.deepcopy(probe.config)
    config.llm.lora = None
    assert torch.equal(_logits(adapted, probe), _logits(_model(dataclasses.replace(probe, config=config)), probe))
    random, zero = ("a", "b") if start == "a_random" else ("b", "a")
    for name, parameter in adapted.named_parameters():
        if name.startswith("llm_lora."):
            assert parameter.any() == name.endswith(f".{random}") != name.endswith(f".{zero}"), name


def test_initial_values_follow_from_the_name_and_the_seed() -> None:
    value = initial_factor("llm_lora.0.q.shared.a", (4, 100), "a_random", 3)
    assert torch.equal(value, initial_factor("llm_lora.0.q.shared.a", (4, 100), "a_random", 3))
    for name, seed in (("llm_lora.0.v.shared.a", 3), ("llm_lora.0.q.shared.a", 4)):
        assert not torch.equal(value, initial_factor(name, (4, 100), "a_random", seed))
    drawn = torch.nn.init.kaiming_uniform_(torch.empty(4, 100), a=math.sqrt(5))
    assert 0.09 < value.abs().max() <= 0.1 and 0.09 < drawn.abs().max() <= 0.1
    assert not initial_factor("llm_lora.0.q.shared.b", (4, 100), "a_random", 3).any()


def _filled(probe: Probe, values: dict[str, Tensor] | None = None) -> MoMESpeechLM:
    """A model in which every term has an effect; some of its parameters as given."""
    model = _model(probe)
    wake_reference(model, seed=1)
    model.load_state_dict(values or {}, strict=False)
    return model


def _of(model: MoMESpeechLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(left: MoMESpeechLM, right: MoMESpeechLM, probe: Probe, differ: MoMESpeechLM) -> None:
    """Two models give the same logits; a third one gives others, so that something was compared."""
    expected = _logits(right, probe)
    torch.testing.assert_close(_logits(left, probe), expected, rtol=0, atol=1e-5)
    assert (_logits(differ, probe) - expected).abs().max() > 1e-2


def test_terms_of_zero_leave_the_shared_one(tmp_path: Path) -> None:
    """Llama-MTSK's MSS without what it has beside MS; and Omni-AVSR's ST beside S."""
    shared = _probe(tmp_path, "{rank: 4, scale: 0.5, terms: [shared]}")
    expected = _filled(shared)
    for kind in ("rates", "task"):
        both = _probe(tmp_path, f"{{rank: 4, scale: 0.5, terms: [shared, {kind}]}}")
        whole = _filled(both, _of(expected))
        nothing = {name: torch.zeros_like(value) for name, value in _of(whole).items() if name not in _of(expected)}
        assert nothing
        _same(_filled(both, _of(expected) | nothing), expected, shared, differ=whole)


def test_tied_terms_are_one(tmp_path: Path) -> None:
    """Llama-MTSK's SS whose LoRAs are all the same is MS."""
    shared, rates = (_probe(tmp_path, f"{{rank: 4, scale: 0.5, terms: [{kind}]}}") for kind in ("shared", "rates"))
    expected = _filled(shared)
    untied = _filled(rates)
    tied = {}
    for name in _of(untied):
        layer, projection, _, factor = name.split(".")[1:] if name.startswith("llm_lora.") else ("",) * 4
        tied[name] = _of(expected)[f"llm_lora.{layer}.{projection}.shared.{factor}" if layer else name]
    _same(_filled(rates, tied), expected, shared, differ=untied)


@pytest.mark.parametrize("kinds", ["shared", "shared, task"])
def test_merged_weights_give_the_same_logits(tmp_path: Path, kinds: str) -> None:
    """In a plain model of Hugging Face: W + scale * B A, of the terms of a view."""
    probe = _probe(tmp_path, f"{{rank: 4, scale: 0.5, terms: [{kinds}]}}")
    probe.config.task.tasks = ["avsr"]
    model = _filled(probe)
    plain_config = copy.deepcopy(probe.config)
    plain_config.llm.lora = None
    plain = build_reference(plain_config, probe.widths).eval()
    plain.load_state_dict(model.state_dict(), strict=False)  # the same projectors
    frozen = _logits(plain, probe)
    weights, view = model.state_dict(), probe.views[0]
    terms = model.terms
    assert terms is not None
    with torch.no_grad():
        for number, layer in enumerate(plain.llm.model.layers):
            for key in "qv":
                for term in terms.of(view):
                    a, b = (weights[f"llm_lora.{number}.{key}.{term}.{factor}"] for factor in "ab")
                    getattr(layer.self_attn, f"{key}_proj").weight += 0.5 * b @ a
    expected = _logits(model, probe)
    torch.testing.assert_close(_logits(plain, probe), expected, rtol=0, atol=1e-5)
    assert (frozen - expected).abs().max() > 1e-2


def test_decoding_uses_the_terms_of_its_view(tmp_path: Path) -> None:
    """Greedy search writes what the whole sequence's logits say, by the view that it is asked for."""
    probe = _probe(tmp_path, "{rank: 4, scale: 2.0, terms: [rates]}")
    model = _filled(probe)
    texts = {}
    for view in probe.views[-2:]:  # of one task, at two rates of audio
        example = probe.example(0, view)
        prefix = example.ids[: example.prefix_length]
        features = {stream: probe.microbatch([0]).features[stream] for stream in ("audio", "video")}
        one = dataclasses.replace(probe, config=copy.deepcopy(probe.config))
        one.config.task.tasks, one.config.task.avsr_audio_rates = ["avsr"], [view.audio_rate or 0]
        (written,) = model.generate([prefix], view, features["audio"], features["video"], eos=2, limits=[5])
        batch = one.microbatch([0])
        first = int(_label_logits(model, batch)[0].argmax())
        assert (written or [2])[0] == first
        texts[str(view)] = _label_logits(model, batch)[0]
    low, high = texts.values()
    assert (low - high).abs().max() > 1e-2


@torch.no_grad()
def _label_logits(model: MoMESpeechLM, batch: Any) -> Tensor:
    return model.label_logits(batch.tokens, batch.features)


def test_decoding_sees_weights_that_change(tmp_path: Path) -> None:
    """What is joined and cast once is so for one call."""
    probe = _probe(tmp_path, "{rank: 4, scale: 2.0, terms: [shared, task]}")
    model, view = _filled(probe), probe.views[0]
    example, features = probe.example(1, view), probe.microbatch([1]).features

    def written() -> list[list[int]]:
        prefix = example.ids[: example.prefix_length]
        return model.generate([prefix], view, features["audio"], [], eos=2, limits=[6])

    first = written()
    assert written() == first
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith("llm_lora.") and name.endswith(".asr.b"):
                value.neg_().mul_(3)
    assert written() != first


def test_a_view_without_its_terms_is_refused() -> None:
    projectors = Projectors({"audio": 4, "video": 4}, {"audio": [4], "video": [2]}, 8, 8, False, "pool")
    check_view(projectors, View("avsr", 4, 2), _terms("rates"))
    with pytest.raises(
        UserError, match=r"avsr\(4,5\) needs the low-rank terms avsr_4_5 .* it has asr_4, asr_16, avsr_4_2"
    ):
        check_view(projectors, View("avsr", 4, 5), _terms("rates"))


def test_engines_hold_them_in_the_order_that_conversions_expect() -> None:
    views = [View("avsr", audio, video) for audio in (2, 10, 4) for video in (1, 10, 2)] + OMNI
    terms = _terms("shared", "task", "rates", views=views)
    of_tokens = TermsOfTokens(terms)
    layers = nn.ModuleList([TensorParallelLoRA(terms, n, 8, 8, 4, 1, False, of_tokens) for n in range(11)])
    parts = {f"llm_lora.{n}": list(layer.named_parts(f"llm_lora.{n}")) for n, layer in enumerate(layers)}  # type: ignore[operator]
    described = {part.name: part for layer in parts.values() for part in layer}
    one_process = nn.ModuleList([LayerLoRA(terms, 8, 8, 4) for _ in range(11)])
    shapes = {f"llm_lora.{name}": tuple(value.shape) for name, value in one_process.named_parameters()}
    assert shapes == {name: part.shape for name, part in described.items()}
    sharing = {name: part.sharing for name, part in described.items()}
    found = ModelTensors(dict(sorted(shapes.items())), sharing, layers=11).whole_modules(range(11))
    parameters = {f"llm_lora.{name}": tuple(value.shape) for name, value in layers.named_parameters()}
    assert {parameter.local: parameter.shape for parameter in found} == parameters
    assert [parameter.local for parameter in found] == list(parameters)
    for parameter in found:
        starts = itertools.accumulate((tensor.count for tensor in parameter.tensors), initial=0)
        for tensor, start in zip(parameter.tensors, starts, strict=False):
            assert described[tensor.local].start == start and described[tensor.local].sharing.packed == parameter.local
    assert list(layers.state_dict(prefix="llm_lora.")) == [t.local for p in found for t in p.tensors]


REFUSED = [
    ("{}", r"llm\.lora\.rank=None and llm\.lora\.reduction=None: set one of them"),
    ("{rank: 4, reduction: 8}", r"llm\.lora\.rank=4 and llm\.lora\.reduction=8: set one of them"),
    ("{rank: 0}", r"llm\.lora\.rank=0: must be at least 1"),
    ("{reduction: 0}", r"llm\.lora\.reduction=0: must be at least 1"),
    ("{rank: 4, scale: 0}", r"llm\.lora\.scale=0\.0: must be above 0"),
    ("{rank: 4, start: zero}", r"llm\.lora\.start='zero': choose from a_random, b_random"),
    ("{rank: 4, terms: [pair]}", r"llm\.lora\.terms='pair': choose from shared, task, rates"),
    ("{rank: 4, terms: []}", r"llm\.lora\.terms=\[\]: name one or more"),
    ("{rank: 4, terms: [task, task]}", r"llm\.lora\.terms=\['task', 'task'\]: name one or more"),
]


@pytest.mark.parametrize(("lora", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_by_name(lora: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_values(load_config([f"llm.lora={lora}"]))


def _config(lora: str) -> RunConfig:
    return load_config([f"llm.lora={lora}"])


def test_sizes_that_do_not_suit_the_llm_are_refused() -> None:
    shape = find_shape("smollm2-135m")
    check_llm_terms(_config("{rank: 4}"), Layout.for_world(3, tp=3), shape)
    check_llm_terms(_config("null"), Layout.for_world(2, tp=2), shape)
    with pytest.raises(
        UserError, match=r"llm\.lora adds to heads .* parallel\.tp=2 does not divide its 3 key-value groups"
    ):
        check_llm_terms(_config("{rank: 4}"), Layout.for_world(2, tp=2), shape)
    with pytest.raises(UserError, match=r"llm\.lora\.reduction=2000 leaves no rank of a hidden size of 576"):
        check_llm_terms(_config("{reduction: 2000}"), Layout.for_world(1), shape)


def test_saved_configurations_and_messages_have_them_as_a_command_line_writes_them() -> None:
    given = "{reduction: 32, scale: 0.125, start: b_random, terms: [shared, rates]}"
    lora = _config(given).llm.lora
    assert str(lora) == given and lora == _config(str(lora)).llm.lora


POOLED = ["projector.per_rate=true", "projector.layer_norm=false"]
STACKED = [*POOLED, "projector.compression=stack"]
PUBLISHED = [  # what trains in all, of models whose low-rank terms are not all that trains
    ("llama-3.1-8b", "asr", ["task.asr_audio_rates=[3]", *STACKED], "{reduction: 64}", 0, 41_949_184),
    ("llama-3.1-8b", "vsr", ["task.vsr_video_rates=[3]", *STACKED], "{reduction: 64}", 64, 48_240_640),
    (
        "llama-3.1-8b",
        "avsr",
        ["task.avsr_audio_rates=[4]", "task.avsr_video_rates=[2]", *STACKED],
        "{reduction: 64}",
        0,
        56_635_392,
    ),
    ("llama-3.2-1b", "all", POOLED, "{reduction: 32, terms: [shared]}", 64, 38_289_408),
    ("llama-3.2-1b", "all", POOLED, "{reduction: 32, terms: [task]}", 64, 51_920_896),
    ("llama-3.2-1b", "all", POOLED, "{reduction: 32, terms: [shared, task]}", 64, 58_736_640),
]


@pytest.mark.parametrize(("llm", "task", "settings", "lora", "encoder_rank", "expected"), PUBLISHED)
def test_totals_are_those_of_the_papers(
    llm: str, task: str, settings: list[str], lora: str, encoder_rank: int, expected: int
) -> None:
    """Llama-AVSR's three models, and Omni-AVSR's S, T and ST."""
    config = load_config(
        [
            "experiment=lrs3",
            "mome=none",
            f"task={task}",
            f"llm.lora={lora}",
            "data.features=online",
            f"video_encoder.lora={f'{{rank: {encoder_rank}}}' if encoder_rank else 'null'}",
            *settings,
        ]
    )
    job = job_of(config, find_shape(llm), Clip(), {"audio": 1024, "video": 1024}, on_gpu=True)
    assert job.trained_parameters == expected


def test_norms_of_products_need_no_product() -> None:
    a, b = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), torch.randn(50, 3)
    assert product_norm(a, b) == pytest.approx(torch.linalg.matrix_norm(b.double() @ a.double()).item(), rel=1e-12)
    assert product_norm(torch.zeros(3, 40), b) == 0
