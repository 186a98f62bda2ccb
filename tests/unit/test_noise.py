"""Babble: the measured ratio is the asked one, 0 dB is not "none", and noise depends on the utterance alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mome_dist.data.corpus import Corpus
from mome_dist.data.media import encode_flac
from mome_dist.data.noise import Babble, mix_at_snr
from mome_dist.data.shards import CorpusWriter, EncodedUtterance
from mome_dist.errors import UserError


def measured_snr(speech: np.ndarray, mixed: np.ndarray) -> float:
    """SNR in dB from clean speech and mixture alone: the part of the mixture along the speech against the rest.

    Independent of how the mixture was scaled. Exact for noise that is orthogonal to the speech.
    """
    gain = np.dot(mixed, speech) / np.dot(speech, speech)
    rest = mixed - gain * speech
    return float(10 * np.log10(np.sum((gain * speech) ** 2) / np.sum(rest**2)))


@pytest.mark.parametrize("snr", [-5.0, 0.0, 5.0, 20.0])
def test_measured_snr_is_the_asked_one(tiny_corpus: Corpus, snr: float) -> None:
    babble = Babble(tiny_corpus)
    for utterance in tiny_corpus.split("test"):
        speech, noise = tiny_corpus.audio(utterance), babble.noise(utterance)
        noise -= (
            np.dot(noise, speech) / np.dot(speech, speech) * speech
        )  # orthogonal, so that the two can be told apart
        mixed = mix_at_snr(speech, noise, snr)
        assert mixed.dtype == np.float32
        assert np.abs(mixed).max() <= 1
        assert measured_snr(speech.astype(float), mixed.astype(float)) == pytest.approx(snr, abs=0.1)


def test_zero_db_is_noise_and_none_is_not(tiny_corpus: Corpus) -> None:
    utterance = tiny_corpus.split("test")[0]
    speech = tiny_corpus.audio(utterance)
    babble = Babble(tiny_corpus)
    np.testing.assert_array_equal(babble.add(speech, utterance, None), speech)
    assert measured_snr(speech, babble.add(speech, utterance, 0.0)) == pytest.approx(0, abs=1)


def test_every_sample_gets_noise(tiny_corpus: Corpus) -> None:
    utterance = tiny_corpus.split("test")[0]
    noise = Babble(tiny_corpus).noise(utterance)
    assert noise.shape == (utterance.samples,)
    quarters = [float(np.std(part)) for part in np.array_split(noise, 4)]
    assert min(quarters) > 0.3 * max(quarters)


def test_noise_depends_on_seed_utterance_and_draw_alone(tiny_corpus: Corpus, tiny_corpus_dir: Path) -> None:
    first, second = tiny_corpus.split("test")[:2]
    babble, other = Babble(tiny_corpus), Babble(Corpus.open(tiny_corpus_dir))
    other.noise(second)  # another order of calls
    expected = babble.noise(first)
    np.testing.assert_array_equal(other.noise(first), expected)
    length = min(first.samples, second.samples)
    for changed in (babble.noise(second), babble.noise(first, draw=1), Babble(tiny_corpus, seed=1).noise(first)):
        assert abs(np.corrcoef(expected[:length], changed[:length])[0, 1]) < 0.5


def test_own_voice_is_never_in_the_babble(tmp_path: Path) -> None:
    """One speaker is a 500 Hz tone, the others are a 1000 Hz tone: their own tone must be missing."""
    time = np.arange(16_000) / 16_000
    with CorpusWriter(tmp_path / "c", "tones", {}) as writer:
        for number, hertz in enumerate((500, 1000, 1000)):
            flac = encode_flac((0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32))
            writer.add("train", EncodedUtterance(f"u{number}", "la", f"s{number}", 16_000, 0, flac, None))
    corpus = Corpus.open(tmp_path / "c")
    tone, other, _ = corpus.split("train")
    spectrum = np.abs(np.fft.rfft(Babble(corpus).noise(tone)))
    assert spectrum[1000] > 100 * spectrum[500]
    assert np.abs(np.fft.rfft(Babble(corpus).noise(other)))[500] > 100


def test_lone_speaker_and_no_talkers_are_user_errors(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", "lone", {}) as writer:
        flac = encode_flac(np.ones(100, np.float32) * 0.1)
        writer.add("train", EncodedUtterance("u", "la", "me", 100, 0, flac, None))
    corpus = Corpus.open(tmp_path / "c")
    with pytest.raises(UserError, match="no speaker but 'me'"):
        Babble(corpus).noise(corpus.split("train")[0])
    with pytest.raises(UserError, match="0 talkers"):
        Babble(corpus, talkers=0)


def test_silence_has_no_ratio() -> None:
    silence, noise = np.zeros(10, np.float32), np.ones(10, np.float32)
    np.testing.assert_array_equal(mix_at_snr(silence, noise, 5), silence)
    np.testing.assert_array_equal(mix_at_snr(noise, silence, 5), noise)
    with pytest.raises(ValueError, match="samples"):
        mix_at_snr(noise, noise[:5], 5)
