"""AV-HuBERT's encoder on mouth crops alone.

The model fuses an audio and a video vector of each frame: both side by side, LayerNorm, a linear map to the encoder's
width. Where a stream is absent its vector is zero, which the LayerNorm and the map see; that is how the model was
trained (modality dropout) and how it is used without audio.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mome_dist.speech.avhubert.config import AVHubertConfig
from mome_dist.speech.avhubert.front_end import FrontEnd
from mome_dist.speech.clip_encoder import ClipEncoder


class VideoAlone(nn.Module):
    """Front end and fusion: one vector a frame, as the Transformer reads it."""

    def __init__(self, config: AVHubertConfig) -> None:
        super().__init__()
        self.video = FrontEnd(config)
        self.fusion_norm = nn.LayerNorm(2 * config.width)
        self.fusion = nn.Linear(2 * config.width, config.width)

    def forward(self, clips: Sequence[Tensor]) -> Tensor:
        """Map normalised clips [T_i, crop, crop] to [sum T_i, width], in order."""
        video_TD = self.video(clips)
        audio_TD = torch.zeros_like(video_TD)
        return self.fusion(self.fusion_norm(torch.cat([audio_TD, video_TD], dim=-1)))


class AVHubertEncoder(ClipEncoder):
    """Mouth crops to features, 25 a second; see `ClipEncoder` for its use."""

    format = "mome_dist.avhubert/1"
    shape = AVHubertConfig
    front_end_class = VideoAlone
    config: AVHubertConfig
    front_end: VideoAlone
