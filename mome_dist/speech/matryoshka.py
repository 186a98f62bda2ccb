"""Matryoshka compression: a rate r turns every r frames of a stream into one token.

Lengths are pure functions of the clip's number of samples or frames, so that every rank can lay out a batch without
running an encoder. Remainders are dropped, as the paper's token counts have it: floor(50 T / A) and floor(25 T / V);
a clip shorter than one window still gives one token.
Source: MoME (arXiv 2510.04136) and Llama-MTSK (arXiv 2503.06362).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.transfer import sent_to

SAMPLES_PER_AUDIO_FRAME = 320  # 16 kHz samples per Whisper frame (50 a second)
MIN_AUDIO_FRAMES = 25
PUBLISHED_OVERHEAD = 7  # tokens before the text that are not speech, in the paper's count


def audio_frames(samples: int) -> int:
    """Number of audio-encoder frames that a clip of ``samples`` at 16 kHz keeps: 50 a second, at least 25."""
    return max(samples // SAMPLES_PER_AUDIO_FRAME, MIN_AUDIO_FRAMES)


def compressed_length(frames: int, rate: int) -> int:
    """Number of tokens that ``frames`` become at ``rate``."""
    return max(frames // rate, 1)


def compress(frames_Td: Tensor, lengths: Sequence[int], rate: int, method: str) -> Tensor:
    """Compress the features of some clips, in one operation for all of them.

    Args:
        frames_Td: [T, d], the frames of one clip after the other; real ones only, no padding.
        lengths: frames of each clip; they add up to T.
        rate: frames per token, at least 1.
        method: "pool" averages the frames of a window: [N, d]. "stack" concatenates them: [N, rate * d].

    Returns:
        ``compressed_length(length, rate)`` tokens of each clip. A clip shorter than one window is averaged over what
        there is, or stacked with zeros behind.
    """
    short = min(lengths) < rate
    if short:
        frames_Td = F.pad(frames_Td, (0, 0, 0, 1))  # a frame of zeros, which fills up windows
    windows, first = [], 0
    for length in lengths:
        tokens = compressed_length(length, rate)
        window = torch.arange(first, first + tokens * rate)
        window[length:] = len(frames_Td) - 1
        windows.append(window)
        first += length
    index = sent_to(torch.cat(windows), frames_Td.device)
    windows_Nrd = frames_Td.index_select(0, index).unflatten(0, (-1, rate))
    if method == "stack":
        return windows_Nrd.flatten(1)
    if not short:
        return windows_Nrd.mean(dim=1)
    counts = [min(length, rate) for length in lengths for _ in range(compressed_length(length, rate))]
    counts_N1 = sent_to(torch.tensor(counts, dtype=frames_Td.dtype)[:, None], frames_Td.device)
    return windows_Nrd.sum(dim=1) / counts_N1


def sequence_length(seconds: float, audio_rate: int, video_rate: int, overhead: int = PUBLISHED_OVERHEAD) -> int:
    """Tokens before the text for an audio-visual clip: ``floor(50 T / A) + floor(25 T / V) + overhead``."""
    return int(50 * seconds) // audio_rate + int(25 * seconds) // video_rate + overhead
