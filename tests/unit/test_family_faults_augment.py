"""Faults of public code of this family that touch noise: a check passes here and fails where the fault is planted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mome_dist.config.schema import AugmentationConfig, NoiseConfig
from mome_dist.data.corpus import Corpus
from mome_dist.data.media import Audio
from mome_dist.data.noise import Babble, mixing, source
from mome_dist.data.noise.mixing import unexplained
from mome_dist.data.transforms import Augmentation

Mix = Callable[[Audio, Audio, float | None], Audio]
REAL_MIX = mixing.mix_at_snr


def _mix_with(monkeypatch: pytest.MonkeyPatch, mix: Mix) -> None:
    monkeypatch.setattr(source, "mix_at_snr", mix)


def _zero_db_is_heard(corpus: Corpus) -> bool:
    """Whether 0 dB gives noise as loud as the speech, asked for and as the only ratio of a training."""
    utterance = corpus.split("test")[0]
    speech, babble = corpus.audio(utterance) * np.float32(0.1), Babble(corpus)
    training = Augmentation.open(AugmentationConfig(noise=NoiseConfig("babble", snr=[0.0])), corpus, "train", 0)
    for mixed, _ in (source.add(babble, speech, utterance, 0.0), training.audio(speech, utterance, 3)):
        ratio = 10 * np.log10(np.mean(speech**2) / max(float(np.mean((mixed - speech) ** 2)), 1e-30))
        if abs(ratio) > 0.1:
            return False
    return True


def test_fault_01_an_snr_of_zero_is_not_an_absent_one(tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _zero_db_is_heard(tiny_corpus)
    with monkeypatch.context() as planted:  # "if snr:" leaves speech clean at 0 dB
        _mix_with(planted, lambda speech, noise, snr: REAL_MIX(speech, noise, snr) if snr else speech)
        assert not _zero_db_is_heard(tiny_corpus)
    with monkeypatch.context() as planted:  # "snr or draw()" takes a random ratio instead
        _mix_with(planted, lambda speech, noise, snr: REAL_MIX(speech, noise, snr or 7.5))
        assert not _zero_db_is_heard(tiny_corpus)
    assert _zero_db_is_heard(tiny_corpus)


def _is_noise_on_every_sample(corpus: Corpus) -> bool:
    """Whether a mixture is one gain of the speech plus one gain of the noise, all along, at the asked ratio."""
    utterance, babble = corpus.split("test")[0], Babble(corpus)
    speech, noise = corpus.audio(utterance), babble.noise(utterance, 5)
    mixed, _ = source.add(babble, speech, utterance, 5.0, 5)
    measured = mixing.measure_snr(speech, noise, mixed)
    return unexplained(speech, noise, mixed) < 1e-9 and measured is not None and abs(measured - 5) < 0.1


def _slipped_axis(speech: Audio, noise: Audio, snr: float | None) -> Audio:
    """The gain meets the first sample of a [1, samples] array instead of its only row."""
    assert snr is not None
    scaled = noise[:, None].copy()
    scaled[0] *= np.float32(np.sqrt(np.mean(speech**2) / np.mean(noise**2) * 10 ** (-snr / 10)))
    mixed = speech + scaled[:, 0]
    return mixed / max(1.0, float(np.abs(mixed).max()))


def _one_sample(speech: Audio, noise: Audio, snr: float | None) -> Audio:
    """Powers along the wrong axis: one sample gets the noise, the others none."""
    assert snr is not None
    mixed = speech.copy()
    mixed[0] += noise[0]
    return mixed


def test_fault_08_noise_is_on_every_sample(tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _is_noise_on_every_sample(tiny_corpus)
    for slip in (_slipped_axis, _one_sample):
        with monkeypatch.context() as planted:
            _mix_with(planted, slip)
            assert not _is_noise_on_every_sample(tiny_corpus)


def _noise_is_reproducible(corpus: Corpus) -> bool:
    """Whether two evaluations that go through the test set in opposite order hear the same."""
    utterances = corpus.split("test")[:3]
    first, second = Babble(corpus), Babble(corpus)
    forward = {each.id: first.noise(each) for each in utterances}
    backward = {each.id: second.noise(each) for each in reversed(utterances)}
    return all(np.array_equal(forward[name], backward[name]) for name in forward)


def test_fault_08_noise_is_seeded_by_the_utterance(tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _noise_is_reproducible(tiny_corpus)
    with monkeypatch.context() as planted:  # one generator for all, as `random` and `torch.randint` are
        shared = np.random.default_rng(0)
        planted.setattr("mome_dist.data.noise.babble.utterance_rng", lambda *_: shared)
        assert not _noise_is_reproducible(tiny_corpus)
