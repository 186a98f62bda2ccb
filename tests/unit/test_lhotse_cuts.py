"""Lists of lhotse's cuts: what is understood of them, what is left out, what is refused."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mome_dist.data.preparation.clips import TRAIN, VALIDATION, Clip
from mome_dist.data.preparation.lhotse import BAD_CUT
from mome_dist.data.preparation.manifests import read_manifest
from mome_dist.data.preparation.utterances import NO_TEXT
from mome_dist.errors import UserError

# As lhotse writes it.
CUT: dict[str, Any] = {
    "id": "cut.1",
    "start": 1.0,
    "duration": 2.5,
    "channel": 0,
    "supervisions": [
        {
            "id": "u",
            "recording_id": "r",
            "start": 0.25,
            "duration": 2.0,
            "channel": 0,
            "text": "Hello",
            "speaker": "anna",
        }
    ],
    "recording": {
        "id": "r",
        "sources": [{"type": "file", "channels": [0], "source": "s1/a.mp4"}],
        "sampling_rate": 48000,
        "num_samples": 192000,
        "duration": 4.0,
        "channel_ids": [0],
    },
    "type": "MonoCut",
}


def cut(**changes: Any) -> dict[str, Any]:
    """A cut with some values changed: ``recording__duration=3`` changes one of the recording's."""
    changed = copy.deepcopy(CUT)
    for path, value in changes.items():
        *parents, last = path.split("__")
        here: Any = changed
        for key in parents:
            here = here[int(key) if key.isdigit() else key]
        here[last] = value
    return changed


def supervision(start: float, text: str | None, **more: Any) -> dict[str, Any]:
    return {"id": f"at {start}", "start": start, "duration": 0.5, "text": text, **more}


def read(tmp_path: Path, *lines: dict[str, Any] | str) -> tuple[list[Clip], list[tuple[str, str]]]:
    """The clips of a list, and reason and detail of what is left out."""
    path = tmp_path / "c.jsonl"
    path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines))
    found = read_manifest(path, TRAIN, tmp_path)
    return found.clips, [(each.reason, each.detail.removeprefix(f"{path}:")) for each in found.left_out]


def test_a_list_of_lhotse(tmp_path: Path) -> None:
    plain, packed = tmp_path / "c.jsonl", tmp_path / "c.jsonl.gz"
    (tmp_path / "media").mkdir()
    text = json.dumps(CUT)
    plain.write_text(text)
    packed.write_bytes(gzip.compress(f"{text}\r\n\r\n".encode()))
    (clip,), left_out = read_manifest(plain, VALIDATION, tmp_path / "media")
    assert (clip.name, clip.speaker, clip.text, clip.start, clip.seconds) == ("cut.1", "anna", "Hello", 1.0, 2.5)
    assert (clip.media, clip.audio, left_out) == (tmp_path / "media/s1/a.mp4", None, [])
    assert read_manifest(packed, VALIDATION, tmp_path / "media") == ([clip], [])


def test_what_else_lhotse_says_about_the_same_sound_is_no_matter(tmp_path: Path) -> None:
    more = {
        "language": "English",
        "gender": "f",
        "alignment": {"word": [["Hello", 0.3, 0.4, None]]},
        "custom": {"a": 1},
    }
    (clip,), _ = read(
        tmp_path,
        cut(
            features={"type": "fbank", "num_frames": 250},
            custom={"snr": 3},
            type="MultiCut",
            channel=[1, 0],
            recording__sources__0__channels=[0, 1],
            recording__sources__0__video={"fps": 25.0, "num_frames": 100, "height": 96, "width": 96},
            recording__transforms=[],
            supervisions=[{**CUT["supervisions"][0], **more, "channel": [0, 1]}],
        ),
    )
    assert (clip.text, clip.audio) == ("Hello", None)
    minimal = {"recording": {"sources": [{"type": "file", "source": "a.mp4"}]}, "supervisions": [{"text": "Hello"}]}
    (clip,), _ = read(tmp_path, {"id": "c", "start": 0, "duration": 1, **minimal})
    assert (clip.text, clip.speaker, clip.seconds) == ("Hello", tmp_path.name, 1.0)


def test_supervisions_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    parts = [supervision(2.0, "third"), supervision(0.0, "first"), supervision(1.0, "second")]
    (clip,), _ = read(tmp_path, cut(supervisions=parts))
    assert clip.text == "first second third"


def test_sound_may_be_in_a_file_of_its_own(tmp_path: Path) -> None:
    film: dict[str, Any] = {"type": "file", "channels": [], "source": "v.mp4", "video": {"fps": 25.0}}
    sound: dict[str, Any] = {"type": "file", "channels": [0], "source": "a.wav"}
    for sources in ([film, sound], [sound, film], [{**film, "channels": [1]}, sound]):
        (clip,), _ = read(tmp_path, cut(recording__sources=sources))
        assert (clip.media, clip.audio) == (tmp_path / "v.mp4", tmp_path / "a.wav")
    (clip,), _ = read(tmp_path, cut(recording__sources=[{**film, "channels": [0]}, {**sound, "channels": [1]}]))
    assert (clip.media, clip.audio) == (tmp_path / "v.mp4", None)
    for sources in (
        [sound, sound],
        [film, film],
        [{**film, "channels": [0]}, sound],
        [film, sound, {**sound, "source": "b.wav"}],
        [film],
    ):
        with pytest.raises(UserError, match=r"c\.jsonl:1: recording 'r' has \d sources, .* exactly one of each"):
            read(tmp_path, cut(recording__sources=sources))


@pytest.mark.parametrize(
    ("changed", "reason", "detail"),
    [
        (cut(supervisions__0__text=None), NO_TEXT, "1: supervision 'u' has no text"),
        (cut(supervisions__0__text=" \n"), NO_TEXT, "1: supervision 'u' has no text"),
        (cut(supervisions=[supervision(0, "a"), supervision(1, None)]), NO_TEXT, "1: supervision 'at 1' has no text"),
        (cut(supervisions=[]), NO_TEXT, "1: cut 'cut.1' has no supervision"),
        (cut(supervisions=None), NO_TEXT, "1: cut 'cut.1' has no supervision"),
        (cut(supervisions__0__start=2.5), BAD_CUT, "1: supervision 'u' is from 2.5 to 4.5 s of a cut of 2.5 s"),
        (cut(supervisions__0__start=1.0), BAD_CUT, "1: supervision 'u' is from 1 to 3 s of a cut of 2.5 s"),
        (cut(supervisions__0__start=-0.5), BAD_CUT, "1: supervision 'u' is from -0.5 to 1.5 s of a cut of 2.5 s"),
        (cut(start=2.0), BAD_CUT, "1: recording 'r' lasts 4 s, and the cut ends at 4.5 s"),
        (cut(start=7.0), BAD_CUT, "1: recording 'r' lasts 4 s, and the cut ends at 9.5 s"),
        (cut(start=7.0, recording__duration=None), BAD_CUT, "1: recording 'r' lasts 4 s, and the cut ends at 9.5 s"),
        (cut(recording__num_samples=96000), BAD_CUT, "1: recording 'r' has a duration of 4 s, but samples for 2 s"),
        (
            cut(supervisions=[supervision(0, "a", speaker="x"), supervision(1, "b", speaker="y")]),
            BAD_CUT,
            "1: cut 'cut.1' has speakers x, y; a clip is of one",
        ),
        (
            cut(supervisions=[supervision(0, "a"), supervision(0.25, "b")]),
            BAD_CUT,
            "1: cut 'cut.1' has supervisions at the same time; a clip is of one voice",
        ),
    ],
)
def test_cuts_that_do_not_fit_are_left_out_by_name(
    tmp_path: Path, changed: dict[str, Any], reason: str, detail: str
) -> None:
    clips, left_out = read(tmp_path, changed, cut(id="good"))
    assert ([clip.name for clip in clips], left_out) == (["good"], [(reason, detail)])
    with pytest.raises(UserError, match=r"names no clip that can be used; the first one: .*c\.jsonl:1: "):
        read(tmp_path, changed)


def test_rounded_times_fit(tmp_path: Path) -> None:
    parts = [supervision(-0.004, "a"), supervision(0.49, "b"), supervision(2.01, "c")]
    (clip,), left_out = read(tmp_path, cut(supervisions=parts, start=1.51, recording__num_samples=192100))
    assert (clip.text, left_out) == ("a b c", [])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (cut(gain=2), "cut 'cut.1' has 'gain', which is not understood"),
        (cut(recording__speed=1.1), "recording 'r' has 'speed', which is not understood"),
        (cut(recording__sources__0__offset=1), "source has 'offset', which is not understood"),
        (cut(supervisions__0__translation="x"), "supervision 'u' has 'translation', which is not understood"),
        (cut(recording__transforms=[{"name": "Speed", "kwargs": {"factor": 0.5}}]), r"transforms=\[.*'Speed'"),
        (cut(recording__transforms=["Resample"]), r"transforms=\['Resample'\]"),
        (cut(type="MixedCut"), "a cut of type 'MixedCut'; only MonoCut and MultiCut"),
        (cut(type="PaddingCut"), "a cut of type 'PaddingCut'"),
        (cut(type=["MonoCut"]), r"a cut of type \['MonoCut'\]"),
        (cut(recording__sources__0__channels=[0, 1]), r"channel 0 of channels \[0, 1\], but the sound is taken"),
        (cut(channel=[0, 1]), r"channel \[0, 1\] of channels \[0\]"),
        (cut(channel=1), "1 sources, 1 of them with 'video' and 0 with channel 1 of the cut"),
        (cut(channel=True), "has channel=True; it must be a whole number"),
        (cut(supervisions__0__channel=1), "supervision 'u' is of channel 1, but the cut of 0"),
        (cut(supervisions__0__recording_id="q"), "supervision 'u' is of recording 'q', but the cut of 'r'"),
        (cut(supervisions__0__text=5), "supervision 'u' has text=5; it must be a string"),
        (cut(supervisions__0__duration=0), "supervision 'u' has duration=0; it must be more than 0"),
        (cut(supervisions=[supervision(0, "a"), {"text": "b"}]), "supervision has no 'start'; it must be a number"),
        (cut(supervisions={}), "has supervisions={}; it must be a list"),
        (cut(start=-1), "has start=-1; it must be a number of at least 0"),
        (cut(start=float("nan")), "has start=nan; it must be a number"),
        (cut(duration=float("inf")), "has duration=inf; it must be a number"),
        (cut(duration=10**400), "has duration=10+; it must be a number"),
        (cut(duration="2.5"), "has duration='2.5'; it must be a number"),
        (cut(duration=True), "has duration=True; it must be a number"),
        (cut(duration=0), "has duration=0; it must be more than 0"),
        (cut(recording__duration=None, duration=None), "cut 'cut.1' has no 'duration'"),
        (cut(recording__duration="4"), "recording 'r' has duration='4'"),
        (cut(recording__sampling_rate=0), "recording 'r' has sampling_rate=0"),
        (cut(id=None), "cut has no 'id'; it must be a string"),
        (cut(recording=None), "recording is None, not an object"),
        (cut(recording__sources=[]), "recording 'r' has 0 sources"),
        (cut(recording__sources__0__type="url"), "a source of type 'url'; only files are read"),
        (cut(recording__sources__0__type="command"), "a source of type 'command'"),
        (cut(recording__sources__0__type="memory"), "a source of type 'memory'"),
        ("{}", "cut has no 'id'"),
        ("[1]", r"cut is \[1\], not an object"),
        ("{", "not JSON"),
        ('{"id": "a", "id": "b"}', "key 'id' occurs twice"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path: Path, changed: dict[str, Any] | str, named: str) -> None:
    with pytest.raises(UserError, match=rf"c\.jsonl:2.* {named}") as error:
        read(tmp_path, CUT, changed)
    assert "\n" not in str(error.value)
