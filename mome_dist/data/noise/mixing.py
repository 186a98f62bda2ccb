"""Mixing at a signal-to-noise ratio, and measuring the ratio of a mixture.

The ratio is of mean powers over the whole clip, pauses included. torchaudio has the sum alone (``add_noise``), without
what is done here about silence and about sums beyond full scale: a dependency for one line.
"""

from __future__ import annotations

import numpy as np

from mome_dist.data.media import Audio


def mix_at_snr(speech: Audio, noise: Audio, snr: float | None) -> Audio:
    """Add ``noise`` to ``speech`` (both float32 [samples]) at ``snr`` dB; None returns the speech as it is.

    Where the sum would leave [-1, 1] it is turned down as a whole, which keeps the ratio. Silent speech or silent noise
    has no ratio: the speech is returned as it is.
    """
    if snr is None:
        return speech
    if speech.shape != noise.shape or speech.ndim != 1:
        raise ValueError(f"speech has shape {speech.shape}, noise {noise.shape}; both must be [samples]")
    speech_power = float(np.mean(np.square(speech, dtype=np.float64)))
    noise_power = float(np.mean(np.square(noise, dtype=np.float64)))
    if speech_power == 0.0 or noise_power == 0.0:
        return speech
    gain = np.sqrt(speech_power / noise_power * 10 ** (-snr / 10))
    mixed = speech + np.float32(gain) * noise
    return np.asarray(mixed / max(1.0, float(np.abs(mixed).max())), np.float32)


def measure_snr(speech: Audio, noise: Audio, mixed: Audio) -> float | None:
    """The ratio in dB at which ``speech`` and ``noise`` (any scale, float [samples]) are in ``mixed``; None if clean.

    The two gains are found by least squares, so that neither a turned-down mixture nor noise that resembles the speech
    matters. Speech and noise must not be multiples of each other. A mixture that is no weighted sum of the two over
    every sample is told from one by `unexplained`.
    """
    gains, speech, noise = _gains(speech, noise, mixed)
    powers = [float(np.sum(np.square(gain * part))) for gain, part in zip(gains, (speech, noise), strict=True)]
    # float32 and 16-bit files leave a residue of noise in clean speech, 90 dB and more below it.
    if powers[1] <= powers[0] * 1e-9:
        return None
    return float(10 * np.log10(powers[0] / powers[1])) if powers[0] else -np.inf


def unexplained(speech: Audio, noise: Audio, mixed: Audio) -> float:
    """The share of the power of ``mixed`` that is no multiple of ``speech`` plus a multiple of ``noise``."""
    gains, speech, noise = _gains(speech, noise, mixed)
    rest = np.asarray(mixed, np.float64) - gains[0] * speech - gains[1] * noise
    return float(np.sum(np.square(rest)) / max(np.sum(np.square(mixed, dtype=np.float64)), 1e-30))


def _gains(speech: Audio, noise: Audio, mixed: Audio) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = np.stack([speech, noise]).astype(np.float64)
    # By the normal equations: two unknowns in float64 leave no doubt in their digits, at a seventh of the time.
    gains, *_ = np.linalg.lstsq(parts @ parts.T, parts @ np.asarray(mixed, np.float64), rcond=None)
    return gains, parts[0], parts[1]
