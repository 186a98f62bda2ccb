"""Noise: the measured ratio is the asked one, 0 dB is not "none", and noise depends on the utterance alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import decode_flac, encode_flac
from mome_dist.data.noise import (
    Babble,
    NoiseFiles,
    NoiseSource,
    add,
    measure_snr,
    mix_at_snr,
    open_noise,
)
from mome_dist.data.shards import CorpusWriter, EncodedUtterance
from mome_dist.errors import UserError
from mome_dist.parallel.forked import run_forked

RATIOS = [-5.0, 0.0, 5.0, 10.0]


def tone(hertz: float, seconds: float, rate: int) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise as people have it: other rates, channels, lengths, formats, nested folders, and files that are no sound."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    (folder / "b/c").mkdir(parents=True)
    soundfile.write(folder / "b/short.WAV", rng.normal(0, 0.1, 1000), 16_000, subtype="PCM_16")
    soundfile.write(folder / "b/c/long.flac", rng.normal(0, 0.05, 600_000), 44_100)
    soundfile.write(folder / "stereo.wav", rng.normal(0, 0.2, (90_000, 2)), 8_000, subtype="FLOAT")
    (folder / "ANNOTATIONS").write_text("no sound")
    return folder


def sources(corpus: Corpus, recordings: Path) -> dict[str, NoiseSource]:
    return {"babble": Babble(corpus), "files": NoiseFiles(recordings)}


def ratio_of_rest(speech: np.ndarray, mixed: np.ndarray) -> float:
    """SNR in dB from clean speech and mixture alone, where the mixture was not turned down: what is not the speech is
    the noise. Independent of `measure_snr`."""
    speech, mixed = speech.astype(np.float64), mixed.astype(np.float64)
    return float(10 * np.log10(np.sum(speech**2) / np.sum((mixed - speech) ** 2)))


@pytest.mark.parametrize("kind", ["babble", "files"])
@pytest.mark.parametrize("snr", RATIOS)
def test_measured_snr_is_the_asked_one(tiny_corpus: Corpus, recordings: Path, kind: str, snr: float) -> None:
    source = sources(tiny_corpus, recordings)[kind]
    for utterance in tiny_corpus.split("test"):
        speech, noise = tiny_corpus.audio(utterance), source.noise(utterance)
        assert noise.dtype == np.float32 and noise.shape == speech.shape
        quiet = speech * np.float32(0.1)  # so that nothing has to be turned down
        assert ratio_of_rest(quiet, add(source, quiet, utterance, snr)[0]) == pytest.approx(snr, abs=0.1)
        mixed, _ = add(source, speech, utterance, snr)
        assert mixed.dtype == np.float32 and np.abs(mixed).max() <= 1
        assert measure_snr(speech, noise, mixed) == pytest.approx(snr, abs=0.01)
        stored = decode_flac(encode_flac(mixed), "mixture", utterance.samples)
        assert measure_snr(speech, noise, stored) == pytest.approx(snr, abs=0.1), "after 16 bits"


def test_a_mixture_too_loud_is_turned_down_at_the_same_ratio(tiny_corpus: Corpus) -> None:
    utterance = tiny_corpus.split("test")[0]
    speech = tiny_corpus.audio(utterance)
    speech = speech / np.abs(speech).max()
    noise = Babble(tiny_corpus).noise(utterance)
    mixed = mix_at_snr(speech, noise, -5.0)
    assert np.abs(mixed).max() == pytest.approx(1)
    assert measure_snr(speech, noise, mixed) == pytest.approx(-5, abs=0.01)
    assert abs(ratio_of_rest(speech, mixed) + 5) > 0.1, "it was turned down"


def test_zero_db_is_noise_and_none_is_not(tiny_corpus: Corpus) -> None:
    utterance = tiny_corpus.split("test")[0]
    speech = tiny_corpus.audio(utterance)
    babble = Babble(tiny_corpus)
    assert add(babble, speech, utterance, None)[0] is speech
    assert measure_snr(speech, babble.noise(utterance), speech) is None
    quiet = speech * np.float32(0.1)
    assert ratio_of_rest(quiet, add(babble, quiet, utterance, 0.0)[0]) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("kind", ["babble", "files"])
def test_every_sample_gets_noise(tiny_corpus: Corpus, recordings: Path, kind: str) -> None:
    utterance = tiny_corpus.split("test")[0]
    noise = sources(tiny_corpus, recordings)[kind].noise(utterance)
    quarters = [float(np.std(part)) for part in np.array_split(noise, 4)]
    assert min(quarters) > 0.3 * max(quarters)


@pytest.mark.parametrize("kind", ["babble", "files"])
def test_noise_depends_on_seed_utterance_and_draw_alone(tiny_corpus_dir: Path, recordings: Path, kind: str) -> None:
    def make(seed: int = 0) -> NoiseSource:
        return open_noise("babble" if kind == "babble" else str(recordings), Corpus.open(tiny_corpus_dir), seed=seed)

    first, second = Corpus.open(tiny_corpus_dir).split("test")[:2]
    source, other = make(), make()
    other.noise(second)  # another order of calls
    expected = source.noise(first)
    np.testing.assert_array_equal(other.noise(first), expected)
    assert other.origins(first) == source.origins(first)
    length = min(first.samples, second.samples)
    for changed in (source.noise(second), source.noise(first, draw=1), make(seed=1).noise(first)):
        assert abs(np.corrcoef(expected[:length], changed[:length])[0, 1]) < 0.5


def _mixtures(corpus_dir: Path, recordings: Path) -> list[bytes]:
    """What one rank of a world mixes, in an order of its own."""
    rank, corpus = int(os.environ["RANK"]), Corpus.open(corpus_dir)
    made = {}
    for utterance in corpus.split("test")[:: 1 - 2 * (rank % 2)]:
        for kind, source in sources(corpus, recordings).items():
            made[utterance.id, kind] = add(source, corpus.audio(utterance), utterance, 0.0, draw=3)[0].tobytes()
    return [made[key] for key in sorted(made)]


def test_every_rank_mixes_the_same(tiny_corpus_dir: Path, tmp_path: Path, recordings: Path) -> None:
    moved = shutil.copytree(recordings, tmp_path / "elsewhere")
    here = run_forked(_mixtures, 2, tiny_corpus_dir, recordings)
    assert here[0] == here[1] == run_forked(_mixtures, 1, tiny_corpus_dir, moved)[0]
    assert len(set(here[0])) == len(here[0])


def test_what_was_mixed_is_said_beside_the_mixture(tiny_corpus: Corpus, recordings: Path) -> None:
    utterances = tiny_corpus.split("test")
    for kind, source in sources(tiny_corpus, recordings).items():
        for utterance in utterances:
            speech = tiny_corpus.audio(utterance)
            mixed, record = add(source, speech, utterance, None, draw=2)
            assert mixed is speech
            assert record == {"id": utterance.id, "draw": 2, "snr": None, "measured": None, "origins": []}
            for snr in (0.0, 5.0):
                _, record = add(source, speech, utterance, snr, draw=2)
                assert (record["id"], record["draw"], record["snr"]) == (utterance.id, 2, snr)
                assert record["measured"] == pytest.approx(snr, abs=0.01)
                assert record["origins"] == [list(origin) for origin in source.origins(utterance, 2)]
                assert len(record["origins"]) == (8 if kind == "babble" else 1)
                assert json.loads(json.dumps(record)) == record
    speakers = {utterance.id: utterance.speaker for utterance in tiny_corpus.split("train")}
    origins = Babble(tiny_corpus).origins(utterances[0])
    assert all(origin.name in speakers for origin in origins)


def test_own_voice_is_never_in_the_babble(tmp_path: Path) -> None:
    """One speaker is a 500 Hz tone, the others are a 1000 Hz tone: their own tone must be missing."""
    with CorpusWriter(tmp_path / "c", "tones", {}) as writer:
        for number, hertz in enumerate((500, 1000, 1000)):
            flac = encode_flac(tone(hertz, 1, 16_000))
            writer.add("train", EncodedUtterance(f"u{number}", "la", f"s{number}", 16_000, 0, flac, None))
    corpus = Corpus.open(tmp_path / "c")
    own, other, _ = corpus.split("train")
    spectrum = np.abs(np.fft.rfft(Babble(corpus).noise(own)))
    assert spectrum[1000] > 100 * spectrum[500]
    assert np.abs(np.fft.rfft(Babble(corpus).noise(other)))[500] > 100


def test_recordings_of_any_rate_keep_their_pitch(tmp_path: Path) -> None:
    for number, rate in enumerate((8_000, 16_000, 22_050, 48_000)):
        folder = tmp_path / str(number)
        folder.mkdir()
        soundfile.write(folder / "tone.wav", tone(1000, 3, rate), rate)
        utterance = Utterance("u", "", "", "", 16_000, 0, {})
        spectrum = np.abs(np.fft.rfft(NoiseFiles(folder).noise(utterance)))
        assert abs(int(spectrum.argmax()) - 1000) <= 1
        assert spectrum[1000] ** 2 > 0.9 * np.sum(spectrum**2)


def test_a_silent_place_is_not_taken_for_noise(tmp_path: Path) -> None:
    silent = np.zeros(160_000, np.float32)
    soundfile.write(tmp_path / "silent.wav", silent, 16_000)
    utterance = Utterance("u", "", "", "", 8000, 0, {})
    with pytest.raises(UserError, match=r"20 places were silent, the last in silent\.wav"):
        NoiseFiles(tmp_path).noise(utterance)
    silent[80_000:] = tone(300, 5, 16_000)
    soundfile.write(tmp_path / "silent.wav", silent, 16_000)
    source = NoiseFiles(tmp_path)
    for draw in range(20):
        assert np.abs(source.noise(utterance, draw)).max() > 0.1
        assert source.origins(utterance, draw)[0].offset > 71_000


def test_wrong_directories_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing does not exist"):
        NoiseFiles(tmp_path / "nothing")
    (tmp_path / "readme.txt").write_text("no noise here")
    with pytest.raises(UserError, match="holds no WAV or FLAC file"):
        NoiseFiles(tmp_path)
    (tmp_path / "fake.wav").write_text("no noise here")
    with pytest.raises(UserError, match=r"fake\.wav: no WAV or FLAC recording"):
        NoiseFiles(tmp_path)
    soundfile.write(tmp_path / "fake.wav", np.zeros(0, np.float32), 16_000)
    with pytest.raises(UserError, match=r"fake\.wav: 0 samples at 16000 Hz"):
        NoiseFiles(tmp_path)
    soundfile.write(tmp_path / "fake.wav", tone(300, 5, 16_000), 16_000, subtype="PCM_16")
    source, utterance = NoiseFiles(tmp_path), Utterance("u", "", "", "", 8000, 0, {})
    (tmp_path / "fake.wav").write_bytes((tmp_path / "fake.wav").read_bytes()[:44])
    with pytest.raises(UserError, match=r"fake\.wav: (cannot be read|ends before)"):
        source.noise(utterance)


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
    for other in (noise[:5], noise[:, None]):
        with pytest.raises(ValueError, match="samples"):
            mix_at_snr(noise, other, 5)
