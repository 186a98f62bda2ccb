"""Noise from a directory of recordings, such as MUSAN's or NOISEX-92's: WAV or FLAC of any rate, length and channels.

Only the part of a file that is needed is read, brought to 16 kHz mono, and repeated where the file is too short.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import soundfile

from mome_dist.data.corpus import Utterance
from mome_dist.data.films import resample_audio
from mome_dist.data.media import SAMPLE_RATE, Audio
from mome_dist.data.noise.source import Origin
from mome_dist.data.seeding import utterance_rng
from mome_dist.errors import UserError, no_folder

SUFFIXES = (".wav", ".flac")
RATES = (4_000, 384_000)  # Hz; others are damage, not recordings
TRIES = 20  # places to look for sound in recordings that are silent in parts
_MARGIN = 64  # samples more than needed, for what the resampler holds back at the end
_SILENCE = 1e-10  # mean power, of full scale; 16-bit files hold nothing below it but zeros


class NoiseFiles:
    """Recordings of a directory and its subdirectories, each as likely as any other.

    Files are known by their path inside the directory and taken in its sorted order, so that any copy of the directory
    gives the same noise. Symbolic links to directories are not followed.

    Raises:
        UserError: the directory holds no WAV or FLAC file, or one of them cannot be read, is empty, or has a rate that
            no recording has.
    """

    def __init__(self, directory: str | Path, seed: int = 0) -> None:
        self.directory, self.seed = Path(directory), seed
        if not self.directory.is_dir():
            raise UserError(f"{directory} {no_folder(directory)}; give one with WAV or FLAC recordings of noise")
        found = [
            Path(folder, name).relative_to(self.directory).as_posix()
            for folder, _, names in os.walk(self.directory)
            for name in names
            if name.lower().endswith(SUFFIXES)
        ]
        if not found:
            raise UserError(f"{directory}: holds no WAV or FLAC file; give a directory with recordings of noise")
        self._files = [(name, *_described(self.directory / name)) for name in sorted(found)]

    def __len__(self) -> int:
        return len(self._files)

    def noise(self, utterance: Utterance, draw: int = 0) -> Audio:
        """Noise as long as the utterance, as loud as it was recorded: float32 [samples]."""
        return self._drawn(utterance, draw)[0]

    def origins(self, utterance: Utterance, draw: int = 0) -> list[Origin]:
        """The file, and the position in its own samples."""
        return [self._drawn(utterance, draw)[1]]

    def _drawn(self, utterance: Utterance, draw: int) -> tuple[Audio, Origin]:
        """The first of several places in several files that is not silent."""
        rng = utterance_rng(self.seed, "noise files", utterance.id, draw)
        for _ in range(TRIES):
            name, frames, rate = self._files[rng.integers(len(self._files))]
            wanted = -(-utterance.samples * rate // SAMPLE_RATE) + _MARGIN
            offset = int(rng.integers(max(frames - wanted, 0) + 1))
            noise = np.resize(self._read(name, offset, wanted, rate), utterance.samples)
            if np.mean(np.square(noise)) > _SILENCE:
                return noise, Origin(name, offset)
        raise UserError(f"{self.directory}: {TRIES} places were silent, the last in {name}; remove silent recordings")

    def _read(self, name: str, offset: int, frames: int, rate: int) -> Audio:
        path = self.directory / name
        try:
            sound, _ = soundfile.read(path, frames, offset, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove or replace it") from error
        if not len(sound):
            raise UserError(f"{path}: ends before sample {offset}, which its header promises; remove or replace it")
        return resample_audio(sound.mean(1), rate, str(path))


def _described(path: Path) -> tuple[int, int]:
    """Samples of one channel and rate of a recording, from its header."""
    try:
        found = soundfile.info(path)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: no WAV or FLAC recording ({error}); remove or replace it") from error
    if found.frames < 1 or not RATES[0] <= found.samplerate <= RATES[1]:
        raise UserError(
            f"{path}: {found.frames} samples at {found.samplerate} Hz; noise needs sound at "
            f"{RATES[0]} to {RATES[1]} Hz: remove or replace it"
        )
    return found.frames, found.samplerate
