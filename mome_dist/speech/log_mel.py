"""Whisper's log-mel spectrogram, of all clips of a batch at once and on the device that encodes them.

The definition is Whisper's (Radford et al., 2022): short-time Fourier transforms with a Hann window, powers gathered by
mel filters, their decimal logarithm, cut off 8 below the clip's loudest value and scaled by (x + 4) / 4. The sound is
padded with silence to whole seconds and reflected at both ends, so that every hop has its window.

A window that hears nothing but padding has a known value, so only windows that reach sound are transformed: with
Whisper's padding to 30 s that is a fifth of the work on clips of 5 s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperFeatureExtractor

FAINTEST = 1e-10  # power that counts as silence
SILENCE = -10.0  # its logarithm
RANGE = 8.0  # below the loudest value of a clip


class LogMel:
    """Makes log-mel spectrograms as a Whisper wants them; fp32 whatever the encoder's precision.

    Args:
        extractor: the Whisper's, which says the window, the hop and the mel filters.

    Attributes:
        rate: samples a second.
    """

    def __init__(self, extractor: WhisperFeatureExtractor) -> None:
        self.rate = int(extractor.sampling_rate)
        self._window, self._hop = int(extractor.n_fft), int(extractor.hop_length)
        self._filters_FM = torch.from_numpy(extractor.mel_filters).float()
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, waveforms: Sequence[Tensor], seconds: int) -> Tensor:
        """Spectrograms of clips that are padded to the same length.

        A clip has the same values alone and in any batch, to the rounding of fp32 sums.

        Args:
            waveforms: fp32 [samples] on one device, none longer than ``seconds``.
            seconds: that each is padded to with silence.

        Returns:
            fp32 [clips, mel bins, hops] on the device of the waveforms; a hop is 10 ms.
        """
        whole = seconds * self.rate
        # A window hears sound up to half its length away, and so does the reflection at the end; beyond, in whole
        # seconds, so that few sizes of transforms are ever planned.
        audible = max(map(len, waveforms)) + self._window // 2 + 1
        heard = min(whole, self.rate * -(-audible // self.rate))
        sound_BS = pad_sequence(list(waveforms), batch_first=True)
        sound_BS = F.pad(sound_BS, (0, heard - sound_BS.shape[1]))
        hann, filters_FM = self._constants(sound_BS.device)
        spectrum_BFT = torch.stft(sound_BS, self._window, self._hop, window=hann, return_complex=True)
        power_BFT = spectrum_BFT[..., :-1].abs().square().contiguous()
        log_BMT = (filters_FM.T @ power_BFT).clamp(min=FAINTEST).log10()
        log_BMT = F.pad(log_BMT, (0, (whole - heard) // self._hop), value=SILENCE)
        loudest = log_BMT.amax((1, 2), keepdim=True)
        return (torch.maximum(log_BMT, loudest - RANGE) + 4.0) / 4.0

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The window and the filters, laid on a device once."""
        if device not in self._placed:
            self._placed[device] = (torch.hann_window(self._window, device=device), self._filters_FM.to(device))
        return self._placed[device]
