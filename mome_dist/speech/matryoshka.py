"""Matryoshka compression: a rate r turns every r frames of a stream into one token.

Lengths are pure functions of the clip's number of samples or frames, so that every rank can lay out a batch without
running an encoder. Remainders are dropped, as the paper's token counts have it: floor(50 T / A) and floor(25 T / V);
a clip shorter than one window still gives one token.
Source: MoME (arXiv 2510.04136) and Llama-MTSK (arXiv 2503.06362).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

SAMPLES_PER_AUDIO_FRAME = 320  # 16 kHz samples per Whisper frame (50 a second)
MIN_AUDIO_FRAMES = 25
PUBLISHED_OVERHEAD = 7  # tokens before the text that are not speech, in the paper's count


def audio_frames(samples: int) -> int:
    """Number of audio-encoder frames that a clip of ``samples`` at 16 kHz keeps: 50 a second, at least 25."""
    return max(samples // SAMPLES_PER_AUDIO_FRAME, MIN_AUDIO_FRAMES)


def compressed_length(frames: int, rate: int) -> int:
    """Number of tokens that ``frames`` become at ``rate``."""
    return max(frames // rate, 1)


def compress(features_Td: Tensor, rate: int, method: str) -> Tensor:
    """Compress one clip's features.

    Args:
        features_Td: [T, d], real frames only (no padding).
        rate: frames per token, at least 1.
        method: "pool" averages the frames of a window: [N, d]. "stack" concatenates them: [N, rate * d].

    Returns:
        ``N = compressed_length(T, rate)`` tokens. A clip shorter than one window is averaged over what there is, or
        stacked with zeros behind.
    """
    frames, width = features_Td.shape
    tokens = compressed_length(frames, rate)
    if method == "stack":
        missing = max(tokens * rate - frames, 0)
        return F.pad(features_Td, (0, 0, 0, missing))[: tokens * rate].reshape(tokens, rate * width)
    if frames < rate:
        return features_Td.mean(dim=0, keepdim=True)
    return features_Td[: tokens * rate].reshape(tokens, rate, width).mean(dim=1)


def sequence_length(seconds: float, audio_rate: int, video_rate: int, overhead: int = PUBLISHED_OVERHEAD) -> int:
    """Tokens before the text for an audio-visual clip: ``floor(50 T / A) + floor(25 T / V) + overhead``."""
    return int(50 * seconds) // audio_rate + int(25 * seconds) // video_rate + overhead
