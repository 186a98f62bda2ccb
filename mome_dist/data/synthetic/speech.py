"""Speech with phone timings from a text-to-speech program: flite, or espeak-ng where flite is not installed.

flite (CMU, `-psdur`) prints every phone with its end time. espeak-ng reports phonemes through a callback of its
library, which the PyPI package `espeakng-loader` ships, so that it needs no administrator. Both are deterministic.
"""

from __future__ import annotations

import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from mome_dist.config.speech_backends import resolve_backend
from mome_dist.data.media import SAMPLE_RATE
from mome_dist.data.synthetic.espeak import Espeak
from mome_dist.data.synthetic.speakers import Voice
from mome_dist.data.synthetic.spoken import Speech, Synthesiser, split_segment
from mome_dist.data.synthetic.visemes import SILENCE, Segment
from mome_dist.errors import UserError

_PAUSE = 0.12  # seconds of silence kept before and after the words

# CMU phones in flite's lower-case spelling -> visemes.
_FLITE_VISEMES: dict[str, tuple[str, ...]] = {
    "pau": ("sil",), "ssil": ("sil",),
    "p": ("PBM",), "b": ("PBM",), "m": ("PBM",), "f": ("FV",), "v": ("FV",), "th": ("TH",), "dh": ("TH",),
    "t": ("TDN",), "d": ("TDN",), "n": ("TDN",), "s": ("SZ",), "z": ("SZ",),
    "sh": ("SHCHJ",), "zh": ("SHCHJ",), "ch": ("SHCHJ",), "jh": ("SHCHJ",),
    "k": ("KGN",), "g": ("KGN",), "ng": ("KGN",), "l": ("L",), "r": ("R",), "er": ("R",), "axr": ("R",),
    "w": ("W",), "hh": ("H",), "y": ("IY",), "iy": ("IY",), "ih": ("IH",), "eh": ("EH",), "ae": ("AE",), "aa": ("AA",),
    "ah": ("AH",), "ax": ("AX",), "ao": ("AO",), "uw": ("UW",), "uh": ("UH",),
    "ey": ("EH", "IY"), "ay": ("AA", "IY"), "oy": ("AO", "IY"), "aw": ("AA", "UW"), "ow": ("OW", "UW"),
}  # fmt: skip


class Flite:
    """The flite program, one run an utterance."""

    _MEAN_F0 = {"slt": 170.0, "rms": 100.0, "awb": 130.0, "kal16": 105.0}  # noqa: RUF012  Hz
    voices = tuple(_MEAN_F0)

    def __init__(self) -> None:
        installed = subprocess.run(["flite", "-lv"], capture_output=True, text=True, check=True).stdout.split()
        if missing := [voice for voice in self.voices if voice not in installed]:
            raise UserError(
                f"flite lacks the voices {', '.join(missing)}; install your distribution's full flite package"
            )

    def speak(self, text: str, voice: Voice) -> Speech:
        with tempfile.TemporaryDirectory(prefix="mome_dist-") as folder:
            path = Path(folder) / "speech.wav"
            command = ["flite", "-voice", voice.name, "--setf", f"duration_stretch={voice.stretch:.4f}"]
            command += ["--setf", f"int_f0_target_mean={self._MEAN_F0[voice.name] * voice.pitch:.2f}"]
            command += ["-psdur", "-t", text, "-o", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0 or not path.exists():
                raise UserError(f"flite failed on {text!r}: {done.stderr.strip() or done.returncode}; reinstall flite")
            audio, rate = soundfile.read(path, dtype="float32")
        if rate != SAMPLE_RATE:
            raise UserError(f"flite voice {voice.name!r} speaks at {rate} Hz; choose one of 16 kHz")
        segments: list[Segment] = []
        start = 0.0
        for item in done.stdout.split():
            phone, end = item.rsplit(":", 1)
            segments += split_segment(start, float(end), _FLITE_VISEMES[phone])
            start = float(end)
        return Speech(audio, segments)


@lru_cache(maxsize=2)
def synthesiser(backend: str) -> Synthesiser:
    """The backend's synthesiser, one a process. Raises UserError when it is not installed."""
    return Flite() if resolve_backend(backend) == "flite" else Espeak()


def _trim(speech: Speech) -> Speech:
    """Shorten the pauses at both ends to `_PAUSE` seconds."""
    spoken = [segment for segment in speech.segments if segment.viseme != SILENCE]
    if not spoken:
        raise UserError("the synthesiser spoke no phone; give it a text with words in it")
    start = max(0.0, spoken[0].start - _PAUSE)
    end = spoken[-1].end + _PAUSE
    audio = speech.audio[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
    kept = [segment for segment in speech.segments if segment.end > start and segment.start < end]
    return Speech(audio, [Segment(s - start, e - start, viseme) for s, e, viseme in kept])


def _warp(speech: Speech, factor: float) -> Speech:
    """Play the sound ``factor`` times as fast, formants and pitch included."""
    samples = int(len(speech.audio) / factor)
    audio = np.interp(np.arange(samples) * factor, np.arange(len(speech.audio)), speech.audio).astype(np.float32)
    return Speech(audio, [Segment(s / factor, e / factor, viseme) for s, e, viseme in speech.segments])


def synthesise(backend: str, text: str, voice: Voice) -> Speech:
    """Say ``text`` with a speaker's voice, including its warp, with short pauses at both ends."""
    return _warp(_trim(synthesiser(backend).speak(text, voice)), voice.warp)
