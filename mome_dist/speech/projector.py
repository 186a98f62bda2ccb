"""Projectors from encoder features to LLM embeddings: Linear, ReLU, Linear, LayerNorm, trained in fp32.

Source: MoME (arXiv 2510.04136); one projector per modality, or one per modality and rate as in Llama-MTSK.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mome_dist.speech.matryoshka import compress
from mome_dist.speech.sequence import SpeechPlaces


class Projectors(nn.Module):
    """Compression and projection of the streams that a run uses.

    Args:
        widths: feature width of each stream, e.g. ``{"audio": 384, "video": 128}``.
        rates: the rates of each stream; they matter only if ``per_rate`` is set.
        hidden_size: of the LLM.
        projector_size: width between the two linear maps (2048 in the paper).
        per_rate: one projector for each rate instead of one for all.
        compression: "pool" or "stack"; stacking needs ``per_rate``, since the input width grows with the rate.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        rates: Mapping[str, Sequence[int]],
        hidden_size: int,
        projector_size: int,
        per_rate: bool,
        compression: str,
    ) -> None:
        super().__init__()
        self.per_rate, self.compression = per_rate, compression
        self.streams = nn.ModuleDict()
        for stream, width in widths.items():
            by_rate = nn.ModuleDict()
            for rate in rates[stream] if per_rate else (0,):
                input_size = width * rate if compression == "stack" else width
                by_rate[self._key(rate)] = nn.Sequential(
                    nn.Linear(input_size, projector_size),
                    nn.ReLU(),
                    nn.Linear(projector_size, hidden_size),
                    nn.LayerNorm(hidden_size),
                )
            self.streams[stream] = by_rate

    def _key(self, rate: int) -> str:
        return f"rate{rate}" if self.per_rate else "all"

    def supports(self, stream: str, rate: int) -> bool:
        """Whether this stream can be projected at this rate."""
        return stream in self.streams and self._key(rate) in cast(nn.ModuleDict, self.streams[stream])

    @torch.no_grad()
    def initialize(self, seed: int, embedding_scale: float) -> None:
        """Set initial values that depend on the seed and each parameter's name only.

        Args:
            embedding_scale: root mean square of the LLM's embeddings; the final LayerNorm starts at it, so that speech
                tokens enter the frozen LLM at the size of the embeddings that it knows.
        """
        for name, parameter in self.named_parameters():
            layer = self.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, nn.LayerNorm):
                parameter.fill_(embedding_scale if name.endswith("weight") else 0.0)
                continue
            assert isinstance(layer, nn.Linear)
            bound = 1 / math.sqrt(layer.in_features)
            generator = torch.Generator().manual_seed((zlib.crc32(f"projectors.{name}".encode()) << 16) ^ seed)
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, stream: str, features: Sequence[Tensor], rate: int) -> Tensor:
        """Compress and project the clips of a batch.

        Args:
            stream: "audio" or "video".
            features: one [T_i, d] tensor a clip, real frames only, any float dtype.
            rate: frames per token.

        Returns:
            fp32 [sum of compressed lengths, H], clips one after the other.
        """
        return self._project(stream, features, [rate])[0]

    def insert(
        self, embedded_NH: Tensor, places: Sequence[SpeechPlaces], features: Mapping[str, Sequence[Tensor]]
    ) -> Tensor:
        """Put speech tokens where sequences have them.

        Clips are projected once for all views that read them at the same rate. A clip without a stream reads zeros for
        its features.

        Args:
            embedded_NH: [N, H] of any float dtype.
            places: of the speech tokens of every view.
            features: of each clip, by stream.

        Returns:
            [N, H], in the same dtype.
        """
        rows, index = [], []
        for stream in dict.fromkeys(place.stream for place in places):
            own = [place for place in places if place.stream == stream]
            clips = list(features[stream])
            nothing = any(place.absent_T is not None for place in own)
            if nothing:
                clips.append(clips[0].new_zeros(1, clips[0].shape[1]))
            rates = list(dict.fromkeys(place.rate for place in own))
            projected = dict(zip(rates, self._project(stream, clips, rates), strict=True))
            for place in own:
                tokens_TH = projected[place.rate]
                if nothing:
                    tokens_TH, absent_1H = tokens_TH[:-1], tokens_TH[-1:]
                    if place.absent_T is not None:
                        tokens_TH = torch.where(place.absent_T[:, None], absent_1H, tokens_TH)
                rows.append(tokens_TH)
                index.append(place.index_T)
        if not rows:
            return embedded_NH
        return embedded_NH.index_copy(0, torch.cat(index), torch.cat(rows).to(embedded_NH.dtype))

    def _project(self, stream: str, clips: Sequence[Tensor], rates: Sequence[int]) -> list[Tensor]:
        """The tokens of all clips at each rate, fp32 [T, H]; rates that share a projector go through it together."""
        frames_Td, lengths = torch.cat([clip.float() for clip in clips]), [len(clip) for clip in clips]
        found: dict[int, Tensor] = {}
        for key in dict.fromkeys(map(self._key, rates)):
            own = [rate for rate in rates if self._key(rate) == key]
            tokens = [compress(frames_Td, lengths, rate, self.compression) for rate in own]
            projected = cast(nn.ModuleDict, self.streams[stream])[key](torch.cat(tokens))
            found |= dict(zip(own, projected.split([len(each) for each in tokens]), strict=True))
        return [found[rate] for rate in rates]
