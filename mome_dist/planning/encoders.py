"""What the encoders cost where clips are encoded in every step (`mome_dist.training.online`).

Each has a precision of its own. The ranks of the first pipeline stage encode, each a share of the clips of its
data-parallel rank, each clip once for all views of a step; all other ranks wait. On GPUs frozen encoders work beside
the passes of the step before (`mome_dist.training.ahead`): the time is counted as if those left nothing idle, and the
memory beside theirs. An encoder with LoRA encodes its clips again after the backward passes, then with a graph
(`mome_dist.training.adaptation`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mome_dist.config.derived import lora_of, schedule_of, streams_of
from mome_dist.config.schema import LoRAConfig, RunConfig
from mome_dist.config.values import ATTENTION
from mome_dist.planning.encoder_shapes import EncoderShape, Transformer, encoder_shape
from mome_dist.planning.hardware import BYTES, Cluster

FP16, FP32 = 2, 4  # bytes
CLIPS_TOGETHER, FRAMES_TOGETHER = 8, 512  # that an encoder is given at once, and the front end of AV-HuBERT
# Bytes that a forward pass in fp32 reads and writes beside its products: for each value of a token's hidden state in a
# layer (two norms, two sums, heads laid out and back), of its feed-forward units, and of the largest pictures before
# the layers (norm, activation, pooling). Operations that it calls for a layer, and for a batch besides.
HIDDEN_BYTES, UNIT_BYTES, PICTURE_BYTES = 64, 8, 40
LAYER_CALLS, BATCH_CALLS = 20, 120
# Values for a token in hidden sizes: held at once by the layer that is computed, beside twice its feed-forward units;
# and kept of each layer for LoRA (inputs of both norms and of the adapted maps, queries, keys, values, their result),
# beside the feed-forward units once.
HELD, KEPT = 6, 7
# Seconds of one core for a second of sound: Whisper's spectrogram where a CPU encodes. CPU time, as
# benchmarks/encoder_sound.py measures it. On a GPU it is a megabyte to move for a second of sound: nothing.
SPECTROGRAM_SECONDS = 1.2e-3


@dataclass(frozen=True)
class StepEncoder:
    """An encoder that works in every step.

    Attributes:
        shape: its sizes.
        precision: "bf16" or "fp32", of its weights.
        seconds: of a clip.
        share: of the steps that read its stream; with `task.views_per_step` some do without.
        lora_parameters: that train; 0 for a frozen one.
        beside: whether it works beside the passes of the step before.
    """

    shape: EncoderShape
    precision: str
    seconds: float
    share: float = 1.0
    lora_parameters: int = 0
    beside: bool = False

    @property
    def weight_bytes(self) -> float:
        """Its weights."""
        return BYTES[self.precision] * self.shape.parameters

    def step_seconds(self, clips: int, cluster: Cluster) -> float:
        """Seconds that a rank takes for its share of a step's clips, with the way back into LoRA."""
        shape, frames = self.shape, self.shape.frames(self.seconds)
        layers, rate, width = shape.transformer, cluster.flops(self.precision), BYTES[self.precision] / FP32
        moved = width * frames * layers.layers * (HIDDEN_BYTES * layers.width + UNIT_BYTES * layers.ffn_width)
        passes = moved / cluster.memory_bytes
        products = layers.flops(frames) / rate
        pictures = width * PICTURE_BYTES * frames * max(each.values for each in shape.front)
        front = shape.front_flops(self.seconds) / rate + pictures / cluster.memory_bytes
        heard = shape.stream == "audio" and not cluster.on_gpu
        sound = SPECTROGRAM_SECONDS * self.seconds if heard else 0.0
        calls = math.ceil(clips / CLIPS_TOGETHER) * (LAYER_CALLS * layers.layers + BATCH_CALLS) * cluster.call
        forward = clips * (sound + front + products + passes) + calls
        if not self.lora_parameters:
            return self.share * forward
        # Frozen maps have gradients of their inputs only, as many products as forward; the front end has none.
        return self.share * (2 * forward + clips * (products + passes) + calls)

    def feature_bytes(self, clips: int) -> float:
        """Features of a data-parallel rank's clips, for the whole step. Those that LoRA learns from are fp32 leaves
        too, and have gradients."""
        values = clips * self.shape.features(self.seconds) * self.shape.width
        return values * (FP16 + 2 * FP32 * (self.lora_parameters > 0))

    def working_bytes(self, clips: int) -> float:
        """What a rank needs to encode its clips, for a moment: one in which nothing is kept of the LLM's layers, unless
        it works beside their passes."""
        frames, layers = min(clips, CLIPS_TOGETHER) * self.shape.frames(self.seconds), self.shape.transformer
        pictures = frames if self.shape.stream == "audio" else min(frames, FRAMES_TOGETHER)
        front = 3 * pictures * max(each.values for each in self.shape.front)
        held = frames * (HELD * layers.width + 2 * layers.ffn_width)
        kept = frames * layers.layers * (KEPT * layers.width + layers.ffn_width)
        return BYTES[self.precision] * max(front, held + kept * (self.lora_parameters > 0))


def step_encoders(config: RunConfig, seconds: float, fast_precision: str, on_gpu: bool) -> tuple[StepEncoder, ...]:
    """The encoders that work in the steps of a run: none where features are cached.

    Args:
        seconds: of a clip.
        fast_precision: of the devices; it settles ``precision=auto``.
        on_gpu: whether they are GPUs.

    Raises:
        UserError: if nothing tells an encoder's sizes.
    """
    if config.data.features != "online":
        return ()
    shapes, lora = [encoder_shape(config, stream) for stream in streams_of(config)], lora_of(config)
    return tuple(
        StepEncoder(
            shape,
            _precision(config, shape.stream, fast_precision),
            seconds,
            _share_of_steps(config, shape.stream),
            _lora_parameters(shape.transformer, lora[shape.stream]) if shape.stream in lora else 0,
            beside=on_gpu and not lora,
        )
        for shape in shapes
    )


def _precision(config: RunConfig, stream: str, fast_precision: str) -> str:
    wanted: str = getattr(config, f"{stream}_encoder").precision
    return fast_precision if wanted == "auto" else wanted


def _share_of_steps(config: RunConfig, stream: str) -> float:
    """How many of the steps have a view that reads a stream."""
    return schedule_of(config).share_reading(stream)


def _lora_parameters(transformer: Transformer, lora: LoRAConfig) -> int:
    """A and B of every adapted layer."""
    width, wide = transformer.width, transformer.ffn_width
    return transformer.layers * lora.rank * sum(2 * width if t in ATTENTION else width + wide for t in lora.targets)
