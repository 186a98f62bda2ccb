"""When words are said: the path through attention, and Whisper's attention on speech whose times are known."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from mome_dist.assets import asset_dir
from mome_dist.data.media import SAMPLE_RATE
from mome_dist.data.synthetic.speakers import Voice
from mome_dist.data.synthetic.speech import synthesise, synthesiser
from mome_dist.data.synthetic.visemes import SILENCE, Segment
from mome_dist.errors import UserError
from mome_dist.transcription.words import WordAligner, warped

BACKEND = "espeak"


def test_the_path_is_the_cheapest_of_all() -> None:
    cost_TF = np.random.default_rng(0).normal(size=(3, 6))

    def paths(token: int, frame: int) -> itertools.chain:
        if (token, frame) == (2, 5):
            return itertools.chain([[(2, 5)]])
        steps = [(token + a, frame + b) for a, b in ((1, 1), (1, 0), (0, 1)) if token + a < 3 and frame + b < 6]
        return itertools.chain.from_iterable(([(token, frame), *rest] for rest in paths(*step)) for step in steps)

    best = min(paths(0, 0), key=lambda path: sum(cost_TF[step] for step in path))
    assert warped(cost_TF).tolist() == [min(frame for token, frame in best if token == number) for number in range(3)]


@pytest.fixture(scope="module")
def aligner() -> WordAligner:
    return WordAligner(asset_dir("whisper-tiny.en"), torch.device("cpu"))


def test_words_are_found_where_they_are_said(aligner: WordAligner) -> None:
    """Words with known silence between them: where each one is, is known to the sample."""
    voice = Voice(synthesiser(BACKEND).voices[0], 1.0, 1.0, 1.0)
    parts, spans, at = [], [], 0.0
    for spoken in ("friday", "bridge", "spring", "yellow"):
        audio = synthesise(BACKEND, spoken, voice).audio
        parts += [audio, np.zeros(round(0.4 * SAMPLE_RATE), np.float32)]
        spans.append((spoken, at, at + len(audio) / SAMPLE_RATE))
        at += len(audio) / SAMPLE_RATE + 0.4
    found = aligner(np.concatenate(parts), " ".join(text for text, _, _ in spans))
    for word, (text, start, end) in zip(found, spans, strict=True):
        assert word.text == text
        middle = (start + end) / 2
        # The pause belongs to either of its neighbours; the middle of a word belongs to it alone. Five of Whisper's
        # frames more, since attention is spread over a few of them.
        assert start - 0.5 < word.start < middle < word.end < end + 0.5
    assert all(before.end == after.start for before, after in itertools.pairwise(found))


def test_words_of_a_sentence_start_within_a_few_hundredths_of_a_second(aligner: WordAligner) -> None:
    """Sentences in which every word has the phones that it has alone, so that its start is known."""
    errors = []
    for number, text in enumerate(("lift black lamp above shop friday now", "keep green box past farm march now")):
        voices = synthesiser(BACKEND).voices
        voice = Voice(voices[number % len(voices)], 1.0, 1.0, 1.0)
        counts = [len(_phones(word, voice)) for word in text.split()]
        spoken = _phones(text, voice)
        assert sum(counts) == len(spoken)
        starts = [spoken[first].start for first in np.cumsum([0, *counts[:-1]])]
        found = aligner(synthesise(BACKEND, text, voice).audio, text)
        errors += [abs(word.start - start) for word, start in zip(found, starts, strict=True)]
    assert np.mean(errors) < 0.06, "three of Whisper's frames"


def _phones(text: str, voice: Voice) -> list[Segment]:
    return [segment for segment in synthesise(BACKEND, text, voice).segments if segment.viseme != SILENCE]


def test_no_words_are_nowhere_and_a_folder_without_a_decoder_is_told(aligner: WordAligner, tmp_path: Path) -> None:
    assert aligner(np.zeros(SAMPLE_RATE, np.float32), " ") == ()
    from safetensors.torch import load_file, save_file

    source = asset_dir("whisper-tiny.en")
    for path in source.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "encoder" in name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="holds no decoder of Whisper"):
        WordAligner(tmp_path, torch.device("cpu"))
