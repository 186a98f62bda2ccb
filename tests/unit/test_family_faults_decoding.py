"""Faults of public code of this family, planted one by one: the check that passes here must fail with the fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from mome_dist.checkpoint import select
from mome_dist.checkpoint.format import checkpoints_of
from mome_dist.checkpoint.select import read_saved
from mome_dist.config.schema import DecodingConfig
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import Audio
from mome_dist.data.noise import measure_snr, mix_at_snr, open_noise
from mome_dist.evaluation import conditions
from mome_dist.evaluation.conditions import ClipReader, conditions_of
from mome_dist.evaluation.decoding import decode
from mome_dist.evaluation.request import ratios_of
from mome_dist.inference.load import LoadedRun, load_run
from mome_dist.speech import reference
from mome_dist.speech.views import View
from tests.evaluation_run import STEP, WIDTHS, add_checkpoint, make_run

VIEW = View("asr", 4, None)
LENGTHS = [30, 90, 41, 64]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tiny_corpus_dir: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("faults"), tiny_corpus_dir)


@pytest.fixture
def run(directory: Path) -> LoadedRun:
    return load_run(directory)


def clips() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [2 * torch.randn(frames, WIDTHS["audio"], generator=generator) for frames in LENGTHS]


def test_fault_01_zero_db_is_not_taken_for_no_noise(tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    utterance = tiny_corpus.split("test")[0]
    sources = {"babble": open_noise("babble", tiny_corpus)}

    def heard_at_zero() -> float | None:
        (condition,) = conditions_of(["babble"], ratios_of(0), ["none"])
        mixed = ClipReader(tiny_corpus, utterance, sources, 0).audio(condition)
        return measure_snr(tiny_corpus.audio(utterance), sources["babble"].noise(utterance), mixed)

    assert heard_at_zero() == pytest.approx(0, abs=0.01)

    def falsy(speech: Audio, noise: Audio, snr: float | None) -> Audio:
        return mix_at_snr(speech, noise, snr) if snr else speech

    monkeypatch.setattr(conditions, "mix_at_snr", falsy)
    assert heard_at_zero() is None, "planted: clean speech in place of 0 dB"


def test_fault_02_padding_is_no_content(run: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DecodingConfig(1, 6, 16)

    def batched_is_single() -> bool:
        def write(batch: list[Tensor]) -> list[str]:
            return decode(run.model, run.sequences, VIEW, batch, [], config)

        return write(clips()) == [write([clip])[0] for clip in clips()]

    assert batched_is_single()
    generate = run.model.llm.generate

    def unmasked(*args: Any, attention_mask: Tensor, **kwargs: Any) -> Any:
        return generate(*args, attention_mask=torch.ones_like(attention_mask), **kwargs)

    monkeypatch.setattr(run.model.llm, "generate", unmasked)
    assert not batched_is_single(), "planted: the mask of lengths is thrown away"


def test_fault_07_best_is_the_lowest_validation_loss(
    directory: Path, run: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_checkpoint(directory, read_saved(directory).config, run.model, STEP + 1)
    losses = [{"step": STEP, "validation": {"asr(4)": 0.3}}, {"step": STEP + 1, "validation": {"asr(4)": 0.7}}]
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in losses))

    def best_is_lowest() -> bool:
        return load_run(directory, select="best").step == STEP

    assert best_is_lowest()
    monkeypatch.setattr(select, "best_checkpoint", lambda path: checkpoints_of(path)[0])
    assert not best_is_lowest(), "planted: the last checkpoint is called the best"


def test_fault_08_noise_of_an_utterance_is_the_same_in_every_order(
    tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tiny_corpus.split("test")[:2]
    (condition,) = conditions_of(["babble"], [0.0], ["none"])

    def heard(order: list[Utterance]) -> list[bytes]:
        sources = conditions.open_sources([condition], tiny_corpus, "train", 0)
        clips = {u.id: ClipReader(tiny_corpus, u, sources, 0).audio(condition) for u in order}
        return [clips[name].tobytes() for name in sorted(clips)]

    assert heard([first, second]) == heard([second, first])
    state = torch.Generator().manual_seed(0)

    def in_turn(self: Any, utterance: Utterance, draw: int = 0) -> Audio:
        noise: Audio = torch.randn(utterance.samples, generator=state).numpy()
        return noise

    monkeypatch.setattr("mome_dist.data.noise.babble.Babble.noise", in_turn)
    assert heard([first, second]) != heard([second, first]), "planted: noise from one stream of numbers"


def always(run: LoadedRun) -> bool:
    """Whether the texts are the same whatever the random generator, and those of the likeliest tokens."""
    texts = []
    for seed in range(3):
        torch.manual_seed(seed)
        texts.append(decode(run.model, run.sequences, VIEW, clips(), [], DecodingConfig(1, 8, 16)))
    return texts[0] == texts[1] == texts[2]


def test_fault_12_nothing_is_sampled(run: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert always(run)
    settings: Callable[..., GenerationConfig] = GenerationConfig
    monkeypatch.setattr(
        reference,
        "GenerationConfig",
        lambda **given: settings(**{**given, "do_sample": True, "temperature": 0.6}),
    )
    assert not always(run), "planted: sampling is left on"


def test_fault_12_settings_beside_an_llm_do_not_leak_in(
    directory: Path, run: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5 comes with temperature, top-p, top-k and a repetition penalty in generation_config.json."""
    expected = decode(run.model, run.sequences, VIEW, clips(), [], DecodingConfig(1, 8, 16))
    shipped = {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 20, "repetition_penalty": 5.0}
    shipped |= {"no_repeat_ngram_size": 1, "max_length": 3}
    path = Path(run.config.llm.path) / "generation_config.json"
    before = path.read_bytes() if path.exists() else None
    path.write_text(json.dumps(shipped))

    def texts(loaded: LoadedRun) -> list[str]:
        return decode(loaded.model, loaded.sequences, VIEW, clips(), [], DecodingConfig(1, 8, 16))

    try:
        loaded = load_run(directory)
    finally:
        path.unlink() if before is None else path.write_bytes(before)
    assert texts(loaded) == expected
    loaded.model.llm.generation_config = GenerationConfig(**shipped)
    assert texts(loaded) != expected, "planted: what came with the LLM is kept"
