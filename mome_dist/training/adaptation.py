"""Training the LoRA of the encoders inside the step, at the memory of a few clips.

The features of a step are made once, without a graph, and serve all its views and microbatches (`training.online`).
They are leaves here: what every backward pass of the schedule finds adds up in their gradients. Then each rank encodes
its share of the clips again, the same ones in the same batches, now with a graph, and takes those gradients on into A
and B. That is the chain rule cut in two at the features: two forward passes of the encoder, so that no more than one
batch of its activations is ever held, and none beside those of the LLM (as in activation checkpointing, arXiv
1604.06174).

Features are rounded to float16 in between. Rounding has no gradient worth the name, so it is passed through as if it
were the identity (the straight-through estimator, arXiv 1308.3432): the rounding is at most 2^-11 of a value.

Scale: the schedule's loss is scaled so that the engine's mean over data-parallel ranks is the global gradient
(`training.step`), and every tensor-parallel rank has the whole gradient of every feature, as it has of the projectors.
Each takes its own share's on, so the sum over tensor-parallel ranks is the gradient of all clips of the data-parallel
rank; from there on A and B are reduced, clipped and stepped as the projectors are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mome_dist.data.encoding import Encoder
from mome_dist.speech.lora import lora_layers

StreamFeatures = Mapping[str, Mapping[str, Tensor]]
"""Features [T, width] by stream and utterance id."""


class Adaptation:
    """Carries the gradients of a step's features into the encoders that made them.

    Args:
        encoders: by stream; those without LoRA are left alone.
        group: the tensor-parallel ranks, which share the clips.
        device: of the encoders.
    """

    def __init__(self, encoders: Mapping[str, Encoder], group: dist.ProcessGroup, device: torch.device) -> None:
        self._encoders = {stream: encoder for stream, encoder in encoders.items() if lora_layers(encoder)}
        self._group, self._device = group, device
        self._batches: list[tuple[str, Sequence[str], Sequence[Tensor]]] = []
        self._leaves: dict[str, dict[str, Tensor]] = {}

    def begin(self) -> None:
        """Forget the step before, which may have ended without a backward pass."""
        self._batches, self._leaves = [], {}

    def keep(self, stream: str, ids: Sequence[str], clips: Sequence[Tensor]) -> None:
        """Note that these clips were encoded together on this rank."""
        if stream in self._encoders:
            self._batches.append((stream, ids, clips))

    def watch(self, features: StreamFeatures) -> StreamFeatures:
        """The features of a step, float16, to be trained on: those of adapted encoders as fp32 leaves of the same
        values, so that their gradients add up in fp32."""
        self._leaves = {
            stream: {name: values.float().requires_grad_() for name, values in features[stream].items()}
            for stream in self._encoders
            if stream in features
        }
        return {**features, **self._leaves}

    def backward(self) -> None:
        """Add the step's gradients to A and B of the streams that it read; every tensor-parallel rank of the first
        stage calls it after the schedule.

        A stream that no clip was heard or seen in (modality dropout) has gradients of zero, so that all data-parallel
        ranks reduce the same tensors.
        """
        for stream, ids, clips in self._batches:
            gradients = [self._leaves[stream][name].grad for name in ids]
            if all(gradient is None for gradient in gradients):
                continue
            encoded = self._encoders[stream]([clip.to(self._device) for clip in clips])
            # Gradients are fp32 whatever the encoder's precision.
            reached = [(v, g.to(v.dtype)) for v, g in zip(encoded, gradients, strict=True) if g is not None]
            torch.autograd.backward([values for values, _ in reached], [gradient for _, gradient in reached])
        terms = [term for stream in self._leaves for term in self._encoders[stream].parameters() if term.requires_grad]
        for term in terms:
            if term.grad is None:
                term.grad = torch.zeros_like(term)
        self._sum_shares([term.grad for term in terms if term.grad is not None])
        self.begin()

    def _sum_shares(self, gradients: Sequence[Tensor]) -> None:
        if not gradients or dist.get_world_size(self._group) == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self._group)
        for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
