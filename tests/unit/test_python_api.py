"""`mome_dist.load` and what it gives: films, arrays and features in, texts and probabilities out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mome_dist
from mome_dist.data.corpus import Corpus
from mome_dist.data.media import encode_flac, write_media_file
from mome_dist.errors import UserError
from mome_dist.speech.matryoshka import compressed_length
from mome_dist.speech.sequence import Example, pack
from mome_dist.speech.views import View, streams_read
from mome_dist.transcription.inputs import Clip, Features
from mome_dist.transcription.model import SpeechModel
from mome_dist.transcription.results import Transcription
from tests.without_packages import python_without


@pytest.fixture(scope="module")
def model(exported: Path) -> SpeechModel:
    return mome_dist.load(exported, device="cpu")


@pytest.fixture(scope="module")
def clips(tiny_corpus: Corpus) -> list[Clip]:
    """Four utterances of unequal lengths."""
    return [Clip(tiny_corpus.audio(each), tiny_corpus.video(each)) for each in tiny_corpus.split("test")]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, clips: list[Clip]) -> Path:
    path = tmp_path_factory.mktemp("sound") / "sound.flac"
    assert isinstance(clips[0].audio, np.ndarray)
    path.write_bytes(encode_flac(clips[0].audio))
    return path


def _teacher_forced(model: SpeechModel, said: Transcription, features: Features) -> list[float]:
    """Log-probabilities of the tokens by the pass that training and its proof use, of one clip without padding."""
    run, view = model.run, said.view
    given = {"audio": features.audio, "video": features.video}
    tokens = {stream: rows for stream, rows in given.items() if rows is not None}
    rates = {"audio": view.audio_rate, "video": view.video_rate}
    counts = [compressed_length(len(tokens[stream]), rate) if rate else 0 for stream, rate in rates.items()]
    prefix = run.sequences.prefix(view, *counts)
    example = Example([*prefix, *said.token_ids, run.sequences.codec.eos], len(prefix))
    with torch.no_grad():
        logits_LV = run.model.label_logits(
            pack([(view, [example])]), {stream: [rows] for stream, rows in tokens.items()}
        )
    picked = logits_LV.log_softmax(dim=-1)[torch.arange(len(said.token_ids)), torch.tensor(said.token_ids)]
    return picked.tolist()


@pytest.mark.parametrize("view", [View("asr", 4, None), View("vsr", None, 5), View("avsr", 4, 5)], ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_texts_and_probabilities_of_many_are_those_of_each(
    model: SpeechModel, clips: list[Clip], view: View, beams: int
) -> None:
    rates: dict[str, Any] = {"audio_rate": view.audio_rate, "video_rate": view.video_rate, "num_beams": beams}
    together = model.transcribe(clips, **rates, batch_size=3)
    assert len({said.token_ids for said in together}) > 1, "every clip decodes alike: the test cannot tell them apart"
    for clip, said in zip(clips, together, strict=True):
        alone = model.transcribe(clip, **rates)
        assert replace(said, log_probs=None) == replace(alone, log_probs=None)
        assert said.view == view and said.seconds == max(clip.seconds[stream] for stream in streams_read([view]))
        assert said.log_probs is not None and said.confidence == pytest.approx(math.exp(np.mean(said.log_probs)))
        expected = _teacher_forced(model, said, model.encode(clip))
        assert said.log_probs == pytest.approx(expected, abs=1e-4) and min(expected) < -0.1
        assert model.run.sequences.codec.decode(said.token_ids) == said.text == str(said)
        assert clip.audio is not None and clip.video is not None
        frames = ((len(clip.audio) / 320, view.audio_rate), (len(clip.video), view.video_rate))  # 320 samples at 50 Hz
        speech = sum(round(count) // rate for count, rate in frames if rate is not None)
        assert said.tokens_read == speech + model.run.sequences.overhead(view)
        assert len(said.tokens) == len(said.token_ids) and said.text.split()[0] in said.tokens


def test_one_encoding_serves_every_rate_and_every_kind_of_input(
    model: SpeechModel, clips: list[Clip], sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = [model.transcribe(clips[0], audio_rate=rate) for rate in (4, 16, 7)]
    features = model.encode(clips[0], streams=["audio"])
    assert features.video is None and features.audio is not None and features.audio.dtype == torch.float32
    monkeypatch.setattr(model, "frozen_encoders", lambda: pytest.fail("features are not encoded again"))
    again = [model.transcribe(features, audio_rate=rate) for rate in (4, 16, 7)]
    assert again == direct
    assert [said.notes for said in again][:2] == [(), ()] and "asr(7) was not trained" in again[2].notes[0]
    monkeypatch.undo()
    audio = clips[0].audio
    assert isinstance(audio, np.ndarray)
    for given in (audio, torch.from_numpy(audio), str(sound), sound):
        assert replace(model.transcribe(given, audio_rate=4), notes=()) == direct[0]
    mixed = model.transcribe([features, audio, sound], audio_rate=4, log_probs=False)
    assert mixed == [replace(direct[0], log_probs=None)] * 3
    bare = Features(audio=features.audio)
    assert model.transcribe(bare, audio_rate=4).seconds == pytest.approx(direct[0].seconds, abs=1 / 50)
    assert model.transcribe([], audio_rate=4) == [] == model.encode([])


def test_what_was_done_to_a_clip_is_told_and_whether_its_text_ended(model: SpeechModel, clips: list[Clip]) -> None:
    assert isinstance(clips[0].audio, np.ndarray)
    loud = model.transcribe(3 * clips[0].audio / np.abs(clips[0].audio).max(), audio_rate=4)
    assert loud.notes == ("inputs[0]: its sound, up to 3 times full scale, was turned down",)
    assert loud.text == model.transcribe(clips[0].audio / np.abs(clips[0].audio).max(), audio_rate=4).text
    limit = model.run.config.decoding.max_new_tokens
    found = model.transcribe(clips, audio_rate=4) + model.transcribe(clips, video_rate=5)
    assert all(said.complete == (len(said.token_ids) < (limit or 0)) for said in found)
    assert not all(said.complete for said in found)


def test_a_run_a_checkpoint_and_an_export_say_the_same(
    run: Path, model: SpeechModel, clips: list[Clip], tmp_path: Path
) -> None:
    expected = model.transcribe(clips[:2], audio_rate=4, video_rate=5)
    places = (run, next((run / "checkpoints").glob("step-*")))
    for place in places:
        assert mome_dist.load(place, precision="fp32").transcribe(clips[:2], audio_rate=4, video_rate=5) == expected
    rounded = mome_dist.load(run, precision="bf16")
    assert rounded.run.model.llm.dtype == torch.bfloat16 and rounded.views == model.views
    assert isinstance(clips[0].audio, np.ndarray) and isinstance(clips[0].video, np.ndarray)
    write_media_file(tmp_path / "film.mp4", clips[0].audio, clips[0].video)
    said = rounded.transcribe(tmp_path / "film.mp4", audio_rate=4, video_rate=5)
    assert said.tokens and said.log_probs is not None and max(said.log_probs) <= 0


ZEROS = np.zeros(16_000, np.float32)
MOUTHS = np.zeros((25, 96, 96), np.uint8)


@pytest.mark.parametrize(
    ("given", "rates", "told"),
    [
        (ZEROS, {}, "no rate is given.*audio_rate=A"),
        (ZEROS, {"audio_rate": 4, "num_beams": 0}, "num_beams=0: must be at least 1"),
        (ZEROS, {"audio_rate": 4, "batch_size": 0}, "batch_size=0: must be at least 1"),
        (ZEROS, {"video_rate": 5}, r"inputs\[0\] has no video: leave out video_rate"),
        ([MOUTHS, ZEROS], {"video_rate": 5}, r"inputs\[1\] has no video"),
        (np.zeros(16_000, np.int16), {"audio_rate": 4}, r"inputs\[0\]: audio is int16 \[16000\]; .*int16 / 32768"),
        (np.zeros((2, 16_000), np.float32), {"audio_rate": 4}, r"float32 \[2, 16000\]; .*one channel"),
        (np.zeros(0, np.float32), {"audio_rate": 4}, r"float32 \[0\]"),
        (np.full(8_000, np.nan, np.float32), {"audio_rate": 4}, r"inputs\[0\]: 8000 of 8000 samples are NaN"),
        (np.zeros((9, 96, 96, 3), np.uint8), {"video_rate": 5}, r"inputs\[0\] has no video"),
        (Clip(video=np.zeros((9, 96, 96, 3), np.uint8)), {"video_rate": 5}, r"uint8 \[9, 96, 96, 3\]; give grey mouth"),
        (np.zeros((9, 224, 224), np.uint8), {"video_rate": 5}, r"\[9, 224, 224\].*the path of a film, whose mouth"),
        (Features(), {"audio_rate": 4}, r"inputs\[0\] has no features of audio: leave out audio_rate"),
        (Features(audio=torch.zeros(9, 5)), {"audio_rate": 4}, r"float32 \[9, 5\], and this model reads .*, 16\]"),
        (3.5, {"audio_rate": 4}, r"inputs\[0\] is a float: give the path"),
        ([ZEROS] * 40 + ["no.flac"], {"audio_rate": 4}, "no.flac does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(
    model: SpeechModel, given: Any, rates: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "frozen_encoders", lambda: pytest.fail("nothing is encoded before all is right"))
    with pytest.raises(UserError, match=told) as caught:
        model.transcribe(given, **rates)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("load", "told"),
    [
        (lambda path: mome_dist.load(path / "none"), "there is no such folder"),
        (lambda path: mome_dist.load(path, device="attic"), "device='attic'"),
        (lambda path: mome_dist.load(path, device="cuda:99"), "device='cuda:99': .*choose another"),
        (lambda path: mome_dist.load(path, precision="fp16"), "llm.precision.*fp16"),
        (lambda path: mome_dist.load(path, llm=path), "llm: .* is not the model that .* was trained with"),
        (lambda path: mome_dist.load(path).encode(ZEROS, streams=["smell"]), "streams: 'smell' is not"),
    ],
)
def test_mistakes_of_loading(exported: Path, load: Callable[[Path], Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(exported)


def test_a_missing_package_is_one_line_that_names_the_extra(exported: Path, sound: Path) -> None:
    """In Python and of the command; what the extra ``infer`` does not bring is not missed (test_pretrained.py)."""
    code = """
import mome_dist
try:
    mome_dist.load(sys.argv[1])
except mome_dist.errors.UserError as error:
    print(error)
from mome_dist.transcribe import main
sys.exit(main())
"""
    told = "torch is not installed: pip install 'mome_dist[infer]' brings it."
    done = python_without({"torch"}, code, exported, sound, "--audio-rate=4")
    assert (done.returncode, done.stdout, done.stderr) == (2, f"{told}\n", f"error: {told}\n")


def test_the_code_of_the_package(model: SpeechModel, exported: Path, sound: Path) -> None:
    """The lines in the docstring of `mome_dist`."""
    code = re.sub(r"(?m)^    ", "", (mome_dist.__doc__ or "").partition("\n\n")[2])
    code = code.replace("runs/quickstart", str(exported)).replace("clip.mp4", str(sound))
    names: dict[str, Any] = {}
    exec(code.replace(", video_rate=2", ""), names)
    assert names["said"] == model.transcribe(sound, audio_rate=4)
