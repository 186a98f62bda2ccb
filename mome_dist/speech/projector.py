"""Projectors from encoder features to LLM embeddings, trained in fp32: one perceptron for all rates of a stream or one
for each, or a mixture of them.

Source: MoME (arXiv 2510.04136); one projector per modality and rate as in Llama-MTSK (arXiv 2503.06362).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from mome_dist.moe.routing import Routing
from mome_dist.speech.balance import Balance, routes_by_router
from mome_dist.speech.matryoshka import compress
from mome_dist.speech.mixture import ProjectorMixture
from mome_dist.speech.perceptron import initialize, perceptron
from mome_dist.speech.sequence import SpeechPlaces


class Projectors(nn.Module):
    """Compression and projection of the streams that a run uses.

    Args:
        widths: feature width of each stream, e.g. ``{"audio": 384, "video": 128}``.
        rates: the rates of each stream; they matter only if ``per_rate`` is set, or in stacking.
        hidden_size: of the LLM.
        projector_size: width between the two linear maps (2048 in the paper).
        per_rate: one projector for each rate instead of one for all.
        compression: "pool" or "stack"; stacking needs ``per_rate``, since the input width grows with the rate, or in a
            mixture one rate of each stream.
        layer_norm: whether projectors end in a layer norm.
        mixture: ``form, experts, top_k, balance_loss, z_loss`` of `ProjectorMixture`; None for one projector where a
            mixture has several.

    Attributes:
        fixed_rates: the rates of each stream that can be projected; None if any can.
        mixture: of the projectors; None without one.

    Raises:
        ValueError: for a mixture with ``per_rate``, or with stacking at several rates.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        rates: Mapping[str, Sequence[int]],
        hidden_size: int,
        projector_size: int,
        per_rate: bool,
        compression: str,
        layer_norm: bool = True,
        mixture: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.per_rate, self.compression, self._layer_norm = per_rate, compression, layer_norm
        self.widths = dict(widths)
        fixed = {stream: tuple(rates[stream]) for stream in widths}
        self.fixed_rates = fixed if per_rate or compression == "stack" else None
        self.mixture: ProjectorMixture | None = None
        if mixture is not None:
            if per_rate or (compression == "stack" and any(len(each) > 1 for each in fixed.values())):
                raise ValueError("the experts of a mixture read inputs of one width, at all rates")
            sizes = {stream: width * self._stacked(fixed[stream][0]) for stream, width in widths.items()}
            self.mixture = ProjectorMixture(sizes, hidden_size, projector_size, layer_norm, **mixture)
            return
        self.streams = nn.ModuleDict()
        for stream, width in widths.items():
            by_rate = nn.ModuleDict()
            for rate in rates[stream] if per_rate else (0,):
                input_size = width * self._stacked(rate)
                by_rate[self._key(rate)] = perceptron(input_size, projector_size, hidden_size, layer_norm)
            self.streams[stream] = by_rate

    def _stacked(self, rate: int) -> int:
        """How many features a compressed one is made of, one beside the other."""
        return rate if self.compression == "stack" else 1

    def _key(self, rate: int) -> str:
        return f"rate{rate}" if self.per_rate else "all"

    def supports(self, stream: str, rate: int) -> bool:
        """Whether this stream can be projected at this rate."""
        return stream in self.widths and (self.fixed_rates is None or rate in self.fixed_rates[stream])

    def initialize(self, seed: int, embedding_scale: float) -> None:
        """Set initial values that depend on the seed and each parameter's name only.

        Args:
            embedding_scale: root mean square of the LLM's embeddings: speech tokens start at about it, so that they
                enter the frozen LLM at the size of the embeddings that it knows (`mome_dist.speech.perceptron`).
        """
        initialize(self, "projectors", seed, embedding_scale, self._layer_norm)

    def forward(self, stream: str, features: Sequence[Tensor], rate: int) -> Tensor:
        """Compress and project the clips of a batch.

        Args:
            stream: "audio" or "video".
            features: one [T_i, d] tensor a clip, real frames only, any float dtype.
            rate: frames per token.

        Returns:
            fp32 [sum of compressed lengths, H], clips one after the other.
        """
        return self._project(stream, features, [rate])[0][0]

    def insert(
        self,
        embedded_NH: Tensor,
        places: Sequence[SpeechPlaces],
        features: Mapping[str, Sequence[Tensor]],
        balance: Balance | None = None,
    ) -> Tensor:
        """Put speech tokens where sequences have them.

        Clips are projected once for all views that read them at the same rate. A clip without a stream reads zeros for
        its features.

        Args:
            embedded_NH: [N, H] of any float dtype.
            places: of the speech tokens of every view.
            features: of each clip, by stream.
            balance: of the routers of a mixture; None outside of training.

        Returns:
            [N, H], in the same dtype.
        """
        rows, index, routed = [], [], []
        for stream in dict.fromkeys(place.stream for place in places):
            own = [place for place in places if place.stream == stream]
            clips = list(features[stream])
            nothing = any(place.absent_T is not None for place in own)
            if nothing:
                clips.append(clips[0].new_zeros(1, clips[0].shape[1]))
            rates = list(dict.fromkeys(place.rate for place in own))
            tokens, routing = self._project(stream, clips, rates)
            projected = dict(zip(rates, tokens, strict=True))
            for place in own:
                tokens_TH = projected[place.rate]
                if nothing:
                    tokens_TH, absent_1H = tokens_TH[:-1], tokens_TH[-1:]
                    if place.absent_T is not None:
                        tokens_TH = torch.where(place.absent_T[:, None], absent_1H, tokens_TH)
                rows.append(tokens_TH)
                index.append(place.index_T)
            if balance is not None and routing is not None:
                views = 1 + max(place.view for place in places)
                sizes = {rate: len(each) for rate, each in projected.items()}
                routed.append((stream, routing, _members(own, sizes, routing.probs_TE.new_zeros(views, 1))))
        if not rows:
            return embedded_NH
        rows_TH = torch.cat(rows)
        if balance is not None and self.mixture is not None:
            rows_TH = balance(rows_TH, routes_by_router(self.mixture, routed))
        return embedded_NH.index_copy(0, torch.cat(index), rows_TH.to(embedded_NH.dtype))

    def _project(
        self, stream: str, clips: Sequence[Tensor], rates: Sequence[int]
    ) -> tuple[list[Tensor], Routing | None]:
        """The tokens of all clips at each rate, fp32 [T, H], and in a mixture where all of them went; rates that share
        a projector go through it together."""
        frames_Td, lengths = torch.cat([clip.float() for clip in clips]), [len(clip) for clip in clips]
        routing: Routing | None = None
        found: dict[int, Tensor] = {}
        for key in dict.fromkeys(map(self._key, rates)):
            own = [rate for rate in rates if self._key(rate) == key]
            tokens = [compress(frames_Td, lengths, rate, self.compression) for rate in own]
            if self.mixture is not None:
                projected, routing = self.mixture(stream, torch.cat(tokens))
            else:
                projected = cast(nn.ModuleDict, self.streams[stream])[key](torch.cat(tokens))
            found |= dict(zip(own, projected.split([len(each) for each in tokens]), strict=True))
        return [found[rate] for rate in rates], routing


def _members(places: Sequence[SpeechPlaces], sizes: Mapping[int, int], zeros_V1: Tensor) -> Tensor:
    """fp32 [V, T], 1 where a view reads a token of a stream.

    Args:
        places: of that stream.
        sizes: tokens at each rate, in their order.
        zeros_V1: as many rows as there are views.
    """
    members_VT = zeros_V1.repeat(1, sum(sizes.values()))
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    for place in places:
        own_T = members_VT[place.view, starts[place.rate] :][: place.index_T.numel()]
        own_T.copy_(torch.ones_like(own_T) if place.absent_T is None else ~place.absent_T)
    return members_VT
