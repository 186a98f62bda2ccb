"""Decoding: what a clip says does not depend on its batch, its place or the number of beams' bookkeeping."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig

from mome_dist.config.schema import DecodingConfig
from mome_dist.errors import UserError
from mome_dist.evaluation.activations import ActivationRecorder
from mome_dist.evaluation.decoding import (
    EXTRA_TOKENS,
    batches_by_length,
    check_view,
    decode,
    decode_batch,
    prefixes_of,
    token_limit,
)
from mome_dist.inference.load import LoadedRun, load_run
from mome_dist.moe.local import LocalMoME
from mome_dist.speech.attachment import attach
from mome_dist.speech.projector import Projectors
from mome_dist.speech.sequence import Example, pack
from mome_dist.speech.views import View
from mome_dist.token_context import OneView
from tests.evaluation_run import WIDTHS, make_run

LENGTHS = [30, 55, 26, 90, 41, 27, 64]
VIEWS = [View("asr", 4, None), View("vsr", None, 5), View("avsr", 4, 5)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_corpus_dir: Path) -> LoadedRun:
    return load_run(make_run(tmp_path_factory.mktemp("decoding"), tiny_corpus_dir))


@pytest.fixture(scope="module")
def clips() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    audio = [2 * torch.randn(frames, WIDTHS["audio"], generator=generator) for frames in LENGTHS]
    video = [2 * torch.randn(frames // 2, WIDTHS["video"], generator=generator) for frames in LENGTHS]
    return audio, video


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_batched_equals_single(
    run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]], view: View, beams: int
) -> None:
    audio, video = clips
    config = DecodingConfig(beams, 8)
    together = decode_batch(run.model, run.sequences, view, audio, video, config)
    alone = [
        decode_batch(run.model, run.sequences, view, [a], [v], config)[0] for a, v in zip(audio, video, strict=True)
    ]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) > 1, "every clip decodes alike: the test cannot tell them apart"


@pytest.mark.parametrize("beams", [1, 3])
def test_a_static_cache_changes_nothing(run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]], beams: int) -> None:
    for view in VIEWS:
        grows, stands = (
            decode_batch(run.model, run.sequences, view, *clips, DecodingConfig(beams, 8, static_cache=static))
            for static in (False, True)
        )
        assert grows == stands


def test_with_a_static_cache_a_token_is_one_graph(
    run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers compiles on a GPU is traced here: one graph, in which nothing asks for a value on the host."""
    expected = decode_batch(run.model, run.sequences, VIEWS[0], *clips, DecodingConfig(1, 8))
    graphs: list[torch.fx.GraphModule] = []
    generate = run.model.llm.generate

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor], **_options: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compiled(*args: Any, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        generation_config.compile_config = CompileConfig(fullgraph=True, backend=backend)
        generation_config.compile_config._compile_all_devices = True
        return generate(*args, generation_config=generation_config, **kwargs)

    monkeypatch.setattr(run.model.llm, "generate", compiled)
    static = DecodingConfig(1, 8, static_cache=True)
    assert decode_batch(run.model, run.sequences, VIEWS[0], *clips, static) == expected
    assert len(graphs) == 1, "a token is more than one graph, or was compiled more than once"


def test_results_are_in_input_order_at_any_batch_size(run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]]) -> None:
    audio, _ = clips
    texts = [
        decode(run.model, run.sequences, VIEWS[0], audio, [], DecodingConfig(1, 6, batch_size))
        for batch_size in (1, 2, 16)
    ]
    assert texts[0] == texts[1] == texts[2]
    backwards = decode(run.model, run.sequences, VIEWS[0], audio[::-1], [], DecodingConfig(1, 6, 2))
    assert backwards[::-1] == texts[0]
    assert decode(run.model, run.sequences, VIEWS[0], [], [], DecodingConfig()) == []


def test_a_rate_that_was_never_trained_decodes(run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]]) -> None:
    unseen = View("avsr", 10, 3)
    assert unseen not in run.views
    assert len(decode(run.model, run.sequences, unseen, *clips, DecodingConfig(1, 4, 16))) == len(LENGTHS)


def test_views_that_a_model_cannot_read_are_named() -> None:
    per_rate = Projectors({"audio": 4}, {"audio": [4, 16]}, 8, 6, per_rate=True, compression="stack")
    check_view(per_rate, View("asr", 16, None))
    with pytest.raises(UserError, match=r"asr\(8\).*rate 8.*4, 16"):
        check_view(per_rate, View("asr", 8, None))
    with pytest.raises(UserError, match=r"vsr\(2\) needs video"):
        check_view(per_rate, View("vsr", None, 2))


def test_batches_hold_similar_lengths_longest_first() -> None:
    batches = batches_by_length(LENGTHS, 3)
    assert batches == [[3, 6, 1], [4, 0, 5], [2]]
    assert batches_by_length([], 3) == []
    with pytest.raises(UserError, match="batch_size=0"):
        batches_by_length(LENGTHS, 0)


@pytest.mark.parametrize("seed", range(6))
def test_neighbours_order_and_padding_change_nothing(
    run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]], seed: int
) -> None:
    draw = random.Random(seed)
    view = draw.choice(VIEWS)
    config = DecodingConfig(
        draw.choice([1, 2, 5]), 7, draw.choice([2, 3, 7]), tokens_per_second=draw.choice([None, 3.0])
    )
    order = draw.sample(range(len(LENGTHS)), draw.randint(2, len(LENGTHS)))
    audio, video = ([stream[i] for i in order] for stream in clips)
    alone = [decode(run.model, run.sequences, view, [a], [v], config)[0] for a, v in zip(audio, video, strict=True)]
    assert decode(run.model, run.sequences, view, audio, video, config) == alone


@pytest.mark.parametrize("beams", [1, 4])
def test_the_plain_way_of_generating_writes_the_same(
    run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]], beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers repeats the inputs for the beams and reads each copy, and experts compute as in training."""
    rows_read: list[int] = []
    first = run.model.llm.model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, given: rows_read.append(given[0].shape[0] * given[0].shape[1]))
    config = DecodingConfig(beams, 9)
    try:
        written = [decode_batch(run.model, run.sequences, view, *clips, config) for view in VIEWS]
        once, rows_read = sum(rows_read), []
        monkeypatch.setattr(type(run.model), "_read_once", lambda *_: None)
        for mome in run.model.momes:
            mome.training = True
        assert [decode_batch(run.model, run.sequences, view, *clips, config) for view in VIEWS] == written
    finally:
        hook.remove()
        run.model.eval()
    assert once < sum(rows_read) / 2 if beams > 1 else once == sum(rows_read)
    assert len({tuple(ids) for view in written for ids in view}) > len(LENGTHS), "clips decode alike"


def test_experts_of_a_prefix_are_counted_once_with_beams(
    run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]]
) -> None:
    counts = []
    for beams in (1, 3):
        recorder = ActivationRecorder(run.model.momes, VIEWS)
        for view in VIEWS:
            decode_batch(run.model, run.sequences, view, *clips, DecodingConfig(beams, 3), recorder)
        counts.append(recorder.result().counts)
    assert torch.equal(*counts) and counts[0].sum() > 0


def test_other_weights_decode_otherwise_at_once(run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]]) -> None:
    """As an evaluation does that also decodes with the weights before training."""
    trained = {name: value.clone() for name, value in run.model.state_dict().items()}
    config = DecodingConfig(2, 6)
    before = decode_batch(run.model, run.sequences, VIEWS[0], clips[0], [], config)
    run.model.load_state_dict({name: value * 1.7 for name, value in trained.items()})
    other = decode_batch(run.model, run.sequences, VIEWS[0], clips[0], [], config)
    run.model.load_state_dict(trained)
    assert decode_batch(run.model, run.sequences, VIEWS[0], clips[0], [], config) == before != other


def next_log_probabilities(run: LoadedRun, view: View, audio: Tensor, prefix: list[int], text: list[int]) -> Tensor:
    """Log probabilities of the token after each of the first ``len(text) + 1`` places of a text of one clip, without
    cache and padding."""
    tokens = pack([(view, [Example([*prefix, *text, run.sequences.codec.eos], len(prefix))])])
    with torch.no_grad():
        return run.model.label_logits(tokens, {"audio": [audio]}).log_softmax(-1)


def test_greedy_search_takes_the_likeliest_token_each_time(
    run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]]
) -> None:
    view, audio, eos = VIEWS[0], clips[0], run.sequences.codec.eos
    for clip, prefix in zip(audio, prefixes_of(run.sequences, view, audio, []), strict=True):
        text: list[int] = []
        while len(text) < 6:
            token = int(next_log_probabilities(run, view, clip, prefix, text)[-1].argmax())
            if token == eos:
                break
            text.append(token)
        assert decode_batch(run.model, run.sequences, view, [clip], [], DecodingConfig(1, 6)) == [text]


def test_wide_beams_find_the_best_of_all_texts(run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]]) -> None:
    """With as many beams as words, two tokens are an exhaustive search: log-probability over length, best of V^2."""
    view, audio, eos = VIEWS[0], clips[0][:4], run.sequences.codec.eos
    words = run.model.llm.config.vocab_size
    expected: list[list[int]] = []
    for clip, prefix in zip(audio, prefixes_of(run.sequences, view, audio, []), strict=True):
        first = next_log_probabilities(run, view, clip, prefix, [])[0]
        scores: dict[tuple[int, ...], float] = {(): float(first[eos])}
        for word in set(range(words)) - {eos}:
            second = next_log_probabilities(run, view, clip, prefix, [word])[1]
            for other in range(words):
                text = (word,) if other == eos else (word, other)
                scores[text] = float(first[word] + second[other]) / 2
        expected.append(list(max(scores.items(), key=lambda entry: entry[1])[0]))
    assert decode_batch(run.model, run.sequences, view, audio, [], DecodingConfig(words, 2)) == expected


def test_each_clip_has_its_own_limit(run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]]) -> None:
    audio, _ = clips
    for beams in (1, 3):
        limited = DecodingConfig(beams, None, 16, tokens_per_second=2.5)
        limits = [token_limit(limited, frames / 50) for frames in LENGTHS]
        written = decode_batch(run.model, run.sequences, VIEWS[0], audio, [], limited)
        assert len(set(limits)) > 2
        assert all(len(ids) <= limit for ids, limit in zip(written, limits, strict=True))
        assert any(len(ids) == limit for ids, limit in zip(written, limits, strict=True)), "no limit was ever reached"
        for clip, ids, limit in zip(audio, written, limits, strict=True):
            alone = DecodingConfig(beams, limit)
            assert decode_batch(run.model, run.sequences, VIEWS[0], [clip], [], alone) == [ids]


def test_limits_in_closed_form() -> None:
    both = DecodingConfig(max_new_tokens=32, tokens_per_second=5.0)
    assert [token_limit(both, seconds) for seconds in (0.0, 0.2, 0.21, 1.0, 10.0)] == [8, 9, 10, 13, 32]
    assert token_limit(replace(both, max_new_tokens=None), 23.0) == 115 + EXTRA_TOKENS
    assert token_limit(DecodingConfig(max_new_tokens=32), 100.0) == 32
    assert token_limit(DecodingConfig(max_new_tokens=None, tokens_per_second=30.0), 0.1) == 3 + EXTRA_TOKENS


def test_bf16_is_deterministic(run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]]) -> None:
    """The same batch gives the same texts; another batch may differ where two tokens are equally likely in bf16."""
    audio, _ = clips
    run.model.llm.to(torch.bfloat16)
    try:
        first, second = (
            decode(run.model, run.sequences, VIEWS[0], audio, [], DecodingConfig(3, 6, 16)) for _ in range(2)
        )
    finally:
        run.model.llm.to(torch.float32)
    assert first == second


MODULES = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


@pytest.mark.parametrize("disk", [(), ("model.layers.1", "model.norm", "lm_head"), ("model.embed_tokens",)], ids=str)
def test_an_llm_in_pieces_writes_the_same(
    run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]], disk: tuple[str, ...]
) -> None:
    placement = {name: "disk" if name in disk else "cpu" for name in MODULES} if disk else {"": "cpu"}
    spread = load_run(run.directory, device_map=placement)
    kept = {name for name, parameter in spread.model.llm.named_parameters() if parameter.device.type == "meta"}
    assert bool(kept) == bool(disk)
    config = DecodingConfig(3, 6, 3)
    for view in (VIEWS[0], VIEWS[2]):
        assert decode(spread.model, spread.sequences, view, *clips, config) == decode(
            run.model, run.sequences, view, *clips, config
        )


def test_mome_goes_where_its_layer_computes() -> None:
    """The device "meta" stands for a second GPU: it has shapes and no values."""
    mome = LocalMoME(8, 4, 2, 1, 2)
    layer = torch.nn.Module()
    layer.mlp = torch.nn.Linear(8, 8, device="meta")
    layer.self_attn = torch.nn.Identity()
    attach(layer, "ffn", mome, lambda _: OneView("asr(4)", None, 0))
    assert layer.mlp(torch.zeros(2, 8, device="meta")).device.type == "meta"
    assert {parameter.device.type for parameter in mome.parameters()} == {"meta"}


@pytest.mark.parametrize(("placement", "named"), [("everywhere", "everywhere"), ({"": "tpu9"}, "does not fit")])
def test_maps_that_do_not_fit_are_named(run: LoadedRun, placement: object, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_run(run.directory, device_map=placement)  # type: ignore[arg-type]
