"""Whole training steps of random models on random clips, by the code that training runs, part by part."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from megatron.core import parallel_state

from benchmarks.gpu.models import Sizes, configuration, random_encoders, random_llm, random_projectors, text_of
from benchmarks.measuring import Stopwatch, Timing
from mome_dist.config.derived import streams_of, views_of
from mome_dist.config.graphs import filled_tokens
from mome_dist.config.schema import RunConfig
from mome_dist.cuda_graphs.kinds import graphs_of
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.encoding import Encoder
from mome_dist.data.media import FPS, SAMPLE_RATE
from mome_dist.data.parts import Parts
from mome_dist.data.prefetch import Clip, ClipLoader
from mome_dist.data.transforms import Augmentation, ModalityDropout
from mome_dist.engine.engine import Engine
from mome_dist.llm.precision import dtype_of
from mome_dist.model.distributed import Chunk, DistributedMoME, attach_mome
from mome_dist.model.shared import build_sequences, mome_arguments
from mome_dist.parallel.layout import Layout
from mome_dist.paths import configs_dir
from mome_dist.planning.encoder_shapes import encoder_shape
from mome_dist.speech.matryoshka import audio_frames
from mome_dist.speech.views import streams_read
from mome_dist.training.batches import BatchBuilder, FeatureReader
from mome_dist.training.online import OnlineEncoding, StepClips, StepFeatures
from mome_dist.training.step import forward_backward

PARTS = ("encoders", "batch", "forward and backward", "gradient reduction", "optimiser step")
MOUTH = 96  # pixels of a side
MANY_STEPS = 1 << 30


class _RandomClips(ClipLoader):
    """A loader whose clips are in memory: what reading costs is no matter of the GPU."""

    def __init__(self, threads: int) -> None:
        super().__init__(cast(Corpus, None), cast(Augmentation, None), threads)
        self._clips: dict[tuple[str, str], Clip] = {}

    def read(self, stream: str, utterance: Utterance, draw: int) -> Clip:
        key = stream, utterance.id
        if key not in self._clips:
            random = np.random.default_rng(len(self._clips))
            if stream == "audio":
                self._clips[key] = Clip(random.normal(0, 0.1, utterance.samples).astype(np.float32))
            else:
                self._clips[key] = Clip(random.integers(0, 256, (utterance.frames, MOUTH, MOUTH), np.uint8))
        return self._clips[key]


def build_model(config: RunConfig, with_mome: bool, device: torch.device) -> DistributedMoME:
    """The frozen LLM with projectors, and with MoME in every layer or without, in a world of one."""
    llm = random_llm(config, Layout.for_world(1), device)
    momes = {}
    if with_mome:
        losses = {"balance_loss": config.mome.balance_loss, "z_loss": config.mome.z_loss}
        momes = attach_mome(
            llm, config.mome.placement, config.seed, ep_size=1, dispatch="local", **losses, **mome_arguments(config)
        )
    if tokens := filled_tokens(config):
        llm.capture_layers(graphs_of(config.llm.graphs, device), tokens)
    return DistributedMoME([Chunk(llm, random_projectors(config).to(device), momes)], 1 if momes else None).train()


class Training:
    """A run on one device whose steps can be timed; inside an open world of one.

    Args:
        config: as `benchmarks.gpu.models.configuration` makes it.
        model: in training mode.
        encoders: that encode the clips of every step; without them features come from the host's memory, as cached ones
            do.
    """

    def __init__(
        self,
        config: RunConfig,
        sizes: Sizes,
        model: DistributedMoME,
        engine: Engine,
        encoders: Mapping[str, Encoder],
        device: torch.device,
    ) -> None:
        self.config, self.model, self.engine, self._device = config, model, engine, device
        self._views = views_of(config)
        text, samples = text_of(sizes), int(sizes.seconds * SAMPLE_RATE)
        frames = int(sizes.seconds * FPS)
        self._utterances = [
            Utterance(f"clip {number}", "", text, "", samples, frames, {}) for number in range(sizes.clips)
        ]
        self._batch = list(range(sizes.clips))
        self._builder = BatchBuilder(
            self._utterances,
            build_sequences(config),
            {stream: self._cached(stream) for stream in streams_of(config)},
            Parts(),
            0,
            1,
            device,
            Layout.for_world(1),
            least_tokens=filled_tokens(config),
        )
        self._online = self._encoding(encoders) if encoders else None

    def _cached(self, stream: str) -> FeatureReader:
        """A reader of features in the host's memory, float16 [T, width]."""
        width = encoder_shape(self.config, stream).width
        generator = torch.Generator().manual_seed(0)
        first = self._utterances[0]
        frames = audio_frames(first.samples) if stream == "audio" else first.frames
        features = {
            each.id: torch.randn(frames, width, generator=generator).to(torch.float16) for each in self._utterances
        }
        return lambda utterance_id: features[utterance_id]

    def _encoding(self, encoders: Mapping[str, Encoder]) -> OnlineEncoding:
        """Encoding inside the step, as `mome_dist.training.setup` has it."""
        held = StepFeatures(ModalityDropout(0, 0, self.config.seed))
        self._builder.read_from({stream: held.reader(stream) for stream in encoders})
        self._builder.leave_out(held.left_out)
        clips = StepClips(self._builder.own(self._batch, self._views), streams_read(self._views), 0)
        loader = _RandomClips(self.config.data.decode_threads)
        group = parallel_state.get_tensor_model_parallel_group()
        return OnlineEncoding(held, loader, encoders, lambda step: clips, MANY_STEPS, group, self._device)

    def step(self, number: int = 0) -> list[Timing]:
        """One step as `mome_dist.training.loop` does it, but for the encoders, which are timed by themselves and not
        beside the passes of the step before: what each of `PARTS` takes."""
        watch = Stopwatch(self._device)
        if self._online is not None:
            self._online.load(number)
        watch.mark()
        step = self._builder.build(self._batch, self._views)
        watch.mark()
        with self.engine.accumulate():
            result = forward_backward(self.model, step)
            finite = math.isfinite(result.loss) and self.engine.gradients_finite()
            watch.mark()
        watch.mark()
        assert finite, "random models give finite losses"
        self.engine.step(1e-5)
        watch.mark()
        return watch.parts()

    @property
    def tokens(self) -> int:
        """Tokens of a step, dead ones left out."""
        step = self._builder.build(self._batch, self._views)
        return step.tokens

    def close(self) -> None:
        """End the threads that read ahead."""
        if self._online is not None:
            self._online.close()


def engine_of(config: RunConfig, model: DistributedMoME) -> Engine:
    """ZeRO 1, as runs have it by default."""
    settings = json.loads((configs_dir() / "deepspeed" / "zero1.json").read_text(encoding="utf-8"))
    return Engine(model, config.optimizer, settings)


def training_of(sizes: Sizes, folder: Path, device: torch.device) -> Training:
    """Everything at once: MoME, and encoders in the step."""
    config = configuration(sizes, folder)
    model = build_model(config, True, device)
    encoders = random_encoders(config, device)
    for stream, encoder in encoders.items():
        encoder.set_precision(dtype_of(getattr(config, f"{stream}_encoder").precision))
    return Training(config, sizes, model, engine_of(config, model), encoders, device)
