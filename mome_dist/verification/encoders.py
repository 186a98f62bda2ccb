"""Encoders that train, in small, and the way of a step's gradients into them.

What a layout has to do with an encoder is which rank encodes which clip, and where the gradients of its features go:
that is the same whatever the encoder computes. So the one here is a block of a Transformer over random frames, with
layers of the names that the real ones have. Features stay fp32, so that all weights can be compared; that runs round
them to float16 is no matter of layouts (`mome_dist.training.adaptation`).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from mome_dist.config.derived import lora_of
from mome_dist.config.schema import RunConfig
from mome_dist.speech.lora import attach_lora
from mome_dist.training.adaptation import Adaptation
from mome_dist.training.batches import Step

# What transformers' Whisper and Hubert call the two layers of a feed-forward block.
FEED_FORWARD = {"audio": ("fc1", "fc2"), "video": ("intermediate_dense", "output_dense")}


class ProbeEncoder(nn.Module):
    """Attention and a feed-forward block over the frames of a clip; frozen but for an attached LoRA.

    Args:
        stream: "audio" or "video"; its weights are a function of it.
        width: of frames and features.
    """

    def __init__(self, stream: str, width: int) -> None:
        super().__init__()
        self.width = width
        self.feed_forward = FEED_FORWARD[stream]
        generator = torch.Generator().manual_seed(zlib.crc32(f"encoder.{stream}".encode()))
        for name in ("q_proj", "k_proj", "v_proj", "out_proj", *self.feed_forward):
            layer = nn.Linear(width, width)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(width, width, generator=generator) / math.sqrt(width))
                layer.bias.copy_(torch.randn(width, generator=generator) / 10)
            self.add_module(name, layer)
        self.requires_grad_(False)

    def forward(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Map clips [T_i, width] to features of the same shapes; each clip by itself."""
        return [self._encoded(clip_TD) for clip_TD in clips]

    def _encoded(self, clip_TD: Tensor) -> Tensor:
        query_TD, key_TD, value_TD = (self.get_submodule(f"{name}_proj")(clip_TD) for name in "qkv")
        weights_TT = (query_TD @ key_TD.T / math.sqrt(self.width)).softmax(dim=-1)
        hidden_TD = clip_TD + self.get_submodule("out_proj")(weights_TT @ value_TD)
        first, second = map(self.get_submodule, self.feed_forward)
        return hidden_TD + second(torch.tanh(first(hidden_TD)))


def trained_encoders(config: RunConfig, widths: Mapping[str, int]) -> dict[str, ProbeEncoder]:
    """The encoders of a run that train, by stream, with their LoRA at its initial values.

    Args:
        widths: of the features of each stream in use.

    Raises:
        UserError: if a target of the LoRA names no layer.
    """
    terms = lora_of(config)
    encoders = {stream: ProbeEncoder(stream, widths[stream]) for stream in terms}
    for stream, lora in terms.items():
        attach_lora(encoders[stream], lora.rank, lora.alpha, lora.targets, config.seed)
    return encoders


def encoded(step: Step, encoders: Mapping[str, ProbeEncoder]) -> Step:
    """A step whose features the encoders make of its clips, in the graph of its loss: for the one-process form."""
    return _replaced(step, {s: [encoders[s](each.features[s]) for each in step.microbatches] for s in encoders})


class RankEncoders:
    """The encoders of one rank, as a run has them: a rank encodes its share of the clips of its data-parallel rank.

    Args:
        encoders: that train, by stream; none on later pipeline stages.
        device: of them and the clips.
    """

    def __init__(self, encoders: Mapping[str, ProbeEncoder], device: torch.device) -> None:
        self._encoders = encoders
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._adaptation = Adaptation(encoders, self._group, device)  # type: ignore[arg-type]

    def load(self, step: Step) -> Step:
        """The step with features instead of clips; all ranks of the tensor-parallel group call it."""
        self._adaptation.begin()
        names = {
            stream: [
                [f"{m}.{n}" for n in range(len(each.features[stream]))] for m, each in enumerate(step.microbatches)
            ]
            for stream in self._encoders
        }
        made: dict[str, dict[str, Tensor]] = {}
        for stream, encoder in self._encoders.items():
            clips = [clip for each in step.microbatches for clip in each.features[stream]]
            ids = [name for each in names[stream] for name in each]
            made[stream] = dict(zip(ids, self._shared(encoder, clips), strict=True))
            rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
            self._adaptation.keep(stream, ids[rank::size], clips[rank::size])
        leaves = self._adaptation.watch(made)
        return _replaced(step, {s: [[leaves[s][name] for name in each] for each in names[s]] for s in names})

    def backward(self) -> None:
        """Take the gradients of the features on into the LoRA; after the backward passes of the step."""
        self._adaptation.backward()

    @torch.no_grad()
    def _shared(self, encoder: ProbeEncoder, clips: Sequence[Tensor]) -> list[Tensor]:
        """Features of all clips, each encoded on one rank of the group."""
        rank, size, features = dist.get_rank(self._group), dist.get_world_size(self._group), []
        for number, clip in enumerate(clips):
            owner = number % size
            values = encoder([clip])[0] if owner == rank else torch.empty_like(clip)
            if size > 1:
                dist.broadcast(values, dist.get_global_rank(self._group, owner), self._group)
            features.append(values)
        return features


def _replaced(step: Step, features: Mapping[str, Sequence[Sequence[Tensor]]]) -> Step:
    """The step with other features of some streams, given by microbatch."""
    microbatches = [
        dataclasses.replace(each, features={**each.features, **{stream: made[m] for stream, made in features.items()}})
        for m, each in enumerate(step.microbatches)
    ]
    return dataclasses.replace(step, microbatches=microbatches)
