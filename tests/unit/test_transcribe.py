"""The command that writes down films: one to standard output, many to a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import srt

import mome_dist
from mome_dist import transcribe
from mome_dist.data.corpus import Corpus
from mome_dist.data.films import Film
from mome_dist.data.media import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, encode_flac, encode_video, write_media_file
from mome_dist.data.preparation.crops import mouth_crops
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.errors import UserError
from mome_dist.speech.geometry import AVHUBERT, RENDERED
from mome_dist.speech.views import View
from mome_dist.transcription.films import transcribe_film, transcribe_reading
from mome_dist.transcription.inputs import Clip
from mome_dist.transcription.model import SpeechModel
from mome_dist.transcription.places import films_at
from mome_dist.transcription.reading import FilmReading
from mome_dist.transcription.results import Segment, Transcription
from tests.evaluation_run import make_run
from tests.face_films import face_video


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_corpus_dir: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("transcribe"), tiny_corpus_dir)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Corpus) -> dict[str, Path]:
    directory, utterance = tmp_path_factory.mktemp("files"), tiny_corpus.split("test")[0]
    audio, video = tiny_corpus.audio(utterance), tiny_corpus.video(utterance)
    paths = {name: directory / name for name in ("both.mp4", "sound.flac", "lips.mp4", "wall.mp4", "face.mp4")}
    write_media_file(paths["both.mp4"], audio, video)
    paths["sound.flac"].write_bytes(encode_flac(audio))
    paths["lips.mp4"].write_bytes(encode_video(video))
    paths["wall.mp4"].write_bytes(encode_video(np.zeros((30, 120, 160), np.uint8)))
    write_media_file(paths["face.mp4"], audio[:32_000], face_video(50))
    return paths


@pytest.mark.parametrize(
    ("file", "rates", "view"),
    [
        ("both.mp4", ["--audio-rate", "4", "--video-rate", "5"], "avsr(4,5)"),
        ("both.mp4", ["--audio-rate", "16"], "asr(16)"),
        ("sound.flac", ["--audio-rate", "4", "--num-beams", "2"], "asr(4)"),
        ("lips.mp4", ["--video-rate", "3"], "vsr(3) (not trained"),
        ("face.mp4", ["--video-rate", "5"], "vsr(5): 2.00 s of film"),
        ("face.mp4", ["--audio-rate", "4", "--video-rate", "5"], "avsr(4,5): 2.05 s of film"),
        ("face.mp4", ["--audio-rate", "4"], "asr(4)"),
    ],
)
def test_text_on_stdout_and_the_rest_on_stderr(
    run: Path, files: dict[str, Path], file: str, rates: list[str], view: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transcribe.main([str(run), str(files[file]), *rates]) == 0
    written = capsys.readouterr()
    assert written.out.count("\n") == 1
    assert view in " ".join(written.err.split())
    assert transcribe.main([str(run), str(files[file]), *rates]) == 0
    assert capsys.readouterr().out == written.out


@pytest.mark.parametrize(
    ("file", "rates", "named"),
    [
        ("sound.flac", ["--video-rate", "2"], "no video stream"),
        ("lips.mp4", ["--audio-rate", "4", "--video-rate", "2"], "no audio stream"),
        ("wall.mp4", ["--video-rate", "2"], "wall.mp4: no face in 30 of 30 frames, 30 of them in a row"),
        ("both.mp4", [], "no rate is given"),
        ("both.mp4", ["--audio-rate", "0"], "at least 1"),
        ("both.mp4", ["--audio-rate", "4", "--format", "str"], "'str' is no format; did you mean srt?"),
        ("both.mp4", ["--audio-rate", "4", "--format", "srt,vtt"], "give --output DIR"),
        ("both.mp4", ["--audio-rate", "4", "--longest", "60"], "--longest 60 must be from 1 to 30 seconds"),
        ("both.mp4", ["--audio-rate", "4", "--list", "no.txt"], "no.txt: cannot be read"),
    ],
)
def test_mistakes(
    run: Path, files: dict[str, Path], file: str, rates: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transcribe.main([str(run), str(files[file]), *rates]) == 2
    written = capsys.readouterr()
    assert named in written.err
    assert written.out == ""


def test_mouths_are_as_large_as_the_encoder_of_the_run_knows_them(
    run: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's encoder was trained on drawn mouths, which are larger than those of the published lip readers."""
    seen: dict[str, np.ndarray] = {}

    def keep(model: SpeechModel, clips: list[Clip], **options: object) -> list[Transcription]:
        (clip,) = clips
        assert isinstance(clip.video, np.ndarray)
        seen["video"] = clip.video
        return [Transcription("", (), (), None, View("vsr", None, 5), 9, 2.0, True)]

    monkeypatch.setattr(SpeechModel, "transcribe", keep)
    assert transcribe.main([str(run), str(files["face.mp4"]), "--video-rate", "5"]) == 0
    film = Film(files["face.mp4"], ["video"])
    (rendered,), (published,) = (
        mouth_crops(film, [(0, film.frames)], FaceMesh, geometry=name) for name in (RENDERED, AVHUBERT)
    )
    np.testing.assert_array_equal(seen["video"], rendered)
    assert isinstance(published, np.ndarray) and (seen["video"] != published).any()


@pytest.fixture(scope="module")
def long_film(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Corpus) -> tuple[Path, list[float]]:
    """Utterances with a second between them, and the seconds of each."""
    sound, pictures = [], []
    for utterance in tiny_corpus.split("test")[:3]:
        audio, video = tiny_corpus.audio(utterance), tiny_corpus.video(utterance)
        sound.append(np.resize(np.pad(audio, (0, SAMPLES_PER_FRAME)), len(video) * SAMPLES_PER_FRAME))
        sound.append(np.zeros(SAMPLE_RATE, np.float32))
        pictures += [video, np.repeat(video[-1:], FPS, axis=0)]
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    write_media_file(path, np.concatenate(sound), np.concatenate(pictures))
    return path, [len(video) / FPS for video in pictures[::2]]


def test_a_long_film_is_read_between_its_pauses(run: Path, long_film: tuple[Path, list[float]]) -> None:
    path, lengths = long_film
    model = mome_dist.load(run, device="cpu")
    done: list[float] = []
    reading = FilmReading(model.run.config, path, View("avsr", 4, 5), longest=4)
    found = transcribe_reading(model, reading, heard=done.append)
    assert len(found.segments) == len(lengths) and not found.notes
    at = 0.0
    for segment, seconds in zip(found.segments, lengths, strict=True):
        np.testing.assert_allclose((segment.start, segment.end), (at, at + seconds), atol=0.4)
        at += seconds + 1
    assert found.seconds == pytest.approx(at, abs=0.1) and 0 < done[-1] <= at
    # What a part says is what it says by itself.
    film, (first, last) = Film(path), (round(time * FPS) for time in (found.segments[1].start, found.segments[1].end))
    alone = Clip(film.audio()[first * SAMPLES_PER_FRAME : last * SAMPLES_PER_FRAME], film.video()[first:last])
    assert found.segments[1].said.text == model.transcribe(alone, audio_rate=4, video_rate=5).text
    assert found.segments[1].said.token_ids


def test_lips_are_cut_where_the_sound_pauses(run: Path, long_film: tuple[Path, list[float]]) -> None:
    model = mome_dist.load(run, device="cpu")
    heard = transcribe_film(model, long_film[0], audio_rate=4, longest=4)
    seen = transcribe_film(model, long_film[0], video_rate=5, longest=4)
    assert list(map(_edges, seen.segments)) == list(map(_edges, heard.segments))
    assert {str(segment.said.view) for segment in seen.segments} == {"vsr(5)"}


def _edges(segment: Segment) -> tuple[float, float]:
    return segment.start, segment.end


def test_a_part_without_a_face_is_read_by_ear_and_said(run: Path, tmp_path: Path, tiny_corpus: Corpus) -> None:
    speech = tiny_corpus.audio(tiny_corpus.split("test")[0])
    half = len(speech) // SAMPLES_PER_FRAME + FPS
    sound = np.concatenate([np.pad(speech, (0, half * SAMPLES_PER_FRAME - len(speech))), speech])
    face = face_video(half)
    path = tmp_path / "film.mp4"
    write_media_file(path, sound, np.concatenate([face, np.zeros_like(face)]))
    found = transcribe_film(mome_dist.load(run, device="cpu"), path, audio_rate=4, video_rate=5, longest=4)
    assert [str(segment.said.view) for segment in found.segments] == ["avsr(4,5)", "asr(4)"]
    (note,) = found.notes
    assert "no face" in note and note.endswith("read by its sound alone")


def test_a_folder_of_films_goes_to_a_folder_of_texts(
    run: Path,
    files: dict[str, Path],
    long_film: tuple[Path, list[float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    films, out = tmp_path / "films", tmp_path / "texts"
    (films / "more").mkdir(parents=True)
    for name, source in (
        ("one.mp4", files["both.mp4"]),
        ("more/two.FLAC", files["sound.flac"]),
        ("long.mp4", long_film[0]),
    ):
        (films / name).write_bytes(source.read_bytes())
    (films / "damaged.mp4").write_bytes(files["both.mp4"].read_bytes()[:3000])
    (films / "mute.mp4").write_bytes(files["lips.mp4"].read_bytes())
    silence = np.random.default_rng(0).normal(0, 0.001, 3 * SAMPLE_RATE).astype(np.float32)
    (films / "silent.flac").write_bytes(encode_flac(silence))
    (films / "notes.txt").write_text("no film")
    arguments = [
        str(run),
        str(films),
        "--audio-rate",
        "4",
        "--output",
        str(out),
        "--format",
        "srt,json",
        "--longest",
        "4",
    ]
    assert transcribe.main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    lines = written.err.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("not written: ")] == [
        str(films / name) for name in ("damaged.mp4", "mute.mp4")
    ]
    assert any("damaged.mp4" in line for line in lines if line.startswith("error: "))
    assert any("4 of 6 films" in line for line in lines)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == sorted(
        f"{name}.{form}" for name in ("one", "long", "silent", "more/two") for form in ("srt", "json")
    )
    record = json.loads((out / "long.json").read_text())
    cues = list(srt.parse((out / "long.srt").read_text()))
    assert " ".join(cue.content for cue in cues).split() == record["text"].split()
    assert all(segment["aligned"] and segment["words"] for segment in record["segments"] if segment["text"])
    assert json.loads((out / "silent.json").read_text())["notes"] == ["nobody speaks in it"]


def test_films_are_named_by_files_folders_patterns_and_lists(tmp_path: Path) -> None:
    for name in ("a.mp4", "b/a.mp4", "b/c.wav", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    everything = films_at([str(tmp_path)])
    assert [str(place.name) for place in everything] == ["a", "b/a", "b/c"]
    assert [place.film.name for place in films_at([str(tmp_path / "b" / "*.wav"), str(tmp_path / "a.mp4")])] == [
        "c.wav",
        "a.mp4",
    ]
    (tmp_path / "list.txt").write_text("b\n\nb/c.wav\n")
    assert [str(place.name) for place in films_at([], tmp_path / "list.txt")] == ["a", "c"]
    for places, told in (
        ([], "no film is named"),
        ([str(tmp_path / "no.mp4")], "does not exist"),
        ([str(tmp_path / "*.mkv")], "no file matches"),
        ([str(tmp_path / "a.mp4"), str(tmp_path / "b/a.mp4")], "would be written to one file, a"),
    ):
        with pytest.raises(UserError, match=told):
            films_at(places)
