"""The command that writes down one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mome_dist import transcribe
from mome_dist.data.corpus import Corpus
from mome_dist.data.films import Film
from mome_dist.data.media import encode_flac, encode_video, write_media_file
from mome_dist.data.preparation.crops import mouth_crops
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.speech.geometry import AVHUBERT, RENDERED
from mome_dist.speech.views import View
from mome_dist.transcription.inputs import Clip
from mome_dist.transcription.model import SpeechModel
from mome_dist.transcription.results import Transcription
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
        ("face.mp4", ["--video-rate", "5"], "2.00 s of video"),
        ("face.mp4", ["--audio-rate", "4", "--video-rate", "5"], "avsr(4,5): 2.05 s of audio, 2.00 s of video"),
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

    def keep(model: SpeechModel, clip: Clip, **options: object) -> Transcription:
        assert isinstance(clip.video, np.ndarray)
        seen["video"] = clip.video
        return Transcription("", (), (), None, View("vsr", None, 5), 9, 2.0, True)

    monkeypatch.setattr(SpeechModel, "transcribe", keep)
    assert transcribe.main([str(run), str(files["face.mp4"]), "--video-rate", "5"]) == 0
    film = Film(files["face.mp4"], ["video"])
    (rendered,), (published,) = (
        mouth_crops(film, [(0, film.frames)], FaceMesh, geometry=name) for name in (RENDERED, AVHUBERT)
    )
    np.testing.assert_array_equal(seen["video"], rendered)
    assert isinstance(published, np.ndarray) and (seen["video"] != published).any()
