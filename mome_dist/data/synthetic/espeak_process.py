"""Speaks one text with espeak-ng's library in a process of its own, for `espeak.Espeak`.

The library's noise generator and filters keep their state from one text to the next, and it seeds its random numbers
from the clock; a fresh process with a fixed seed gives the same sound for the same text. Only ctypes is imported, so
that it starts in milliseconds. Structures and constants are those of espeak-ng's public header `speak_lib.h`.

Standard input: a JSON object {library, data, voice, rate, pitch, text}. Standard output: a JSON line {rate, phones:
[[seconds, name], ...]}, then the sound as native 16-bit samples.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

_SYNCHRONOUS = 2
_PHONEME_EVENTS, _IPA_NAMES, _DONT_EXIT = 0x0001, 0x0002, 0x8000
_RATE, _PITCH = 1, 3
_EVENT_END, _EVENT_PHONEME = 0, 7
_UTF8 = 1


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


def speak(request: dict[str, Any]) -> tuple[int, list[tuple[float, str]], bytes]:
    """Return sampling rate, (start in seconds, IPA name) of every phoneme, and the samples."""
    pcm = bytearray()
    phones: list[tuple[float, str]] = []

    def receive(wave: Any, samples: int, events: Any) -> int:
        if samples > 0 and wave:
            pcm.extend(ctypes.string_at(wave, 2 * samples))
        for event in events if events else ():
            if event.type == _EVENT_END:
                break
            if event.type == _EVENT_PHONEME:
                name = bytes(event.id.string).split(b"\0")[0].decode("utf-8", "ignore")
                phones.append((event.audio_position / 1000, name))
        return 0

    library = ctypes.CDLL(request["library"])
    options = _PHONEME_EVENTS | _IPA_NAMES | _DONT_EXIT
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, request["data"].encode(), options)
    if rate <= 0:
        sys.exit("espeak-ng cannot start")
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    callback = _Callback(receive)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(request["voice"].encode()) != 0:
        sys.exit(f"espeak-ng has no voice {request['voice']!r}")
    for parameter, value in ((_RATE, request["rate"]), (_PITCH, request["pitch"])):
        library.espeak_SetParameter(parameter, value, 0)
    size, void, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint
    library.espeak_Synth.argtypes = [void, size, number, ctypes.c_int, number, number, void, void]
    text = request["text"].encode() + b"\0"
    library.espeak_Synth(text, len(text), 0, 1, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    return rate, phones, bytes(pcm)


def main() -> None:
    """Answer one request."""
    rate, phones, pcm = speak(json.load(sys.stdin))
    sys.stdout.buffer.write(json.dumps({"rate": rate, "phones": phones}).encode() + b"\n" + pcm)


if __name__ == "__main__":
    main()
