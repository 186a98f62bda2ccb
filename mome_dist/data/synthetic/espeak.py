"""espeak-ng as a speech backend: its library through ctypes, phoneme times from its event callback.

Structures and constants are those of espeak-ng's public header `speak_lib.h`.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mome_dist.data.media import resample_audio
from mome_dist.data.synthetic.speakers import Voice
from mome_dist.data.synthetic.speech import Speech, split_segment
from mome_dist.data.synthetic.visemes import SILENCE, Segment
from mome_dist.errors import UserError

_SYNCHRONOUS = 2
_PHONEME_EVENTS, _IPA_NAMES, _DONT_EXIT = 0x0001, 0x0002, 0x8000
_RATE, _PITCH = 1, 3
_EVENT_END, _EVENT_PHONEME = 0, 7
_UTF8 = 1
_WORDS_PER_MINUTE = 165
_MIDDLE_PITCH, _PITCH_SPAN = 50, 60

# ruff: noqa: RUF001 (IPA letters resemble Latin ones)
_VISEME_SIGNS = {
    "PBM": "pbm", "FV": "fv", "TH": "θð", "TDN": "tdnɾ", "SZ": "sz", "SHCHJ": "ʃʒ", "KGN": "kɡgŋx", "L": "lɫ",
    "R": "ɹrɚɝ", "W": "wʍ", "H": "h", "IY": "ji", "IH": "ɪᵻ", "EH": "eɛ", "AE": "æa", "AA": "ɑ", "AH": "ʌɐ", "AX": "əɜ",
    "AO": "ɔɒ", "OW": "o", "UW": "u", "UH": "ʊ",
}  # fmt: skip
_IPA_VISEMES = {sign: viseme for viseme, signs in _VISEME_SIGNS.items() for sign in signs}


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Espeak:
    """The espeak-ng library. It has global state: one object a process, no threads."""

    voices = ("en-us", "en-us+f3", "en-gb-x-rp", "en-us+m3")

    def __init__(self) -> None:
        loader = importlib.import_module("espeakng_loader")
        self._library = ctypes.CDLL(str(loader.get_library_path()))
        options = _PHONEME_EVENTS | _IPA_NAMES | _DONT_EXIT
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(loader.get_data_path()).encode(), options)
        if self._rate <= 0:
            raise UserError(
                "espeak-ng cannot start; reinstall it (`pip install --force-reinstall espeakng-loader==0.2.4`)"
            )
        self._pcm: list[NDArray[np.int16]] = []
        self._phones: list[tuple[float, str]] = []
        self._callback = _Callback(self._receive)  # kept: the library holds a bare pointer to it
        self._library.espeak_SetSynthCallback(self._callback)
        size, void, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint
        self._library.espeak_Synth.argtypes = [void, size, number, ctypes.c_int, number, number, void, void]

    def _receive(self, wave: Any, samples: int, events: Any) -> int:
        if samples > 0 and wave:
            self._pcm.append(np.ctypeslib.as_array(wave, (samples,)).copy())
        for event in events if events else ():
            if event.type == _EVENT_END:
                break
            if event.type == _EVENT_PHONEME:
                name = bytes(event.id.string).split(b"\0")[0].decode("utf-8", "ignore")
                self._phones.append((event.audio_position / 1000, name))
        return 0

    def speak(self, text: str, voice: Voice) -> Speech:
        """Say ``text``; see `Synthesiser.speak`."""
        self._pcm, self._phones = [], []
        if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice.name!r}; choose one of {', '.join(self.voices)}")
        pitch = _MIDDLE_PITCH + _PITCH_SPAN * (voice.pitch - 1)
        for parameter, value in ((_RATE, _WORDS_PER_MINUTE / voice.stretch), (_PITCH, pitch)):
            self._library.espeak_SetParameter(parameter, round(value), 0)
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        if not self._pcm:
            raise UserError(f"espeak-ng said nothing for {text!r}; reinstall espeakng-loader")
        audio = np.concatenate(self._pcm).astype(np.float32) / np.float32(32768)
        return Speech(resample_audio(audio, self._rate), self._segments(len(audio) / self._rate))

    def _segments(self, duration: float) -> list[Segment]:
        segments: list[Segment] = []
        ends = [start for start, _ in self._phones[1:]] + [duration]
        for (start, name), end in zip(self._phones, ends, strict=True):
            signs = name.replace("tʃ", "ʃ").replace("dʒ", "ʒ")  # the lips show one gesture for an affricate
            visemes = tuple(_IPA_VISEMES[sign] for sign in signs if sign in _IPA_VISEMES) or (SILENCE,)
            if end > start:
                segments += split_segment(start, end, visemes)
        return segments
