"""What the runs to be compared train: a model of a given configuration and a few batches of random speech.

Nothing depends on the layout: utterance ``i`` is a function of ``i``, initial values are functions of global names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mome_dist.config.derived import schedule_of, streams_joined, streams_of, views_of, widths_of
from mome_dist.config.graphs import filled_tokens
from mome_dist.config.schema import LoRAConfig, RunConfig
from mome_dist.data.order import share_of_rank
from mome_dist.llm.shape import LLMShape
from mome_dist.model.distributed import MicroBatch
from mome_dist.moe.experts import initial_value, narrowed
from mome_dist.moe.forms.registry import find_form
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.parts import NamedPart
from mome_dist.planning.job import typical_batch
from mome_dist.speech.matryoshka import compressed_length
from mome_dist.speech.reference import layout_free_tensors
from mome_dist.speech.sequence import AUDIO, VIDEO, Example, pack
from mome_dist.speech.views import View
from mome_dist.token_context import ALIGNMENT
from mome_dist.training.batches import Step, input_tokens, token_multiple

WIDTHS = {"audio": 12, "video": 10}  # of the random features
TAGS = {"bos": 1, "eos": 2, "prompt": 3, "audio": (4, 5), "video": (6, 7)}
FIRST_WORD = 8  # ids below it are tags
SMALL_RANK = 4  # of low-rank terms in small modules
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Probe:
    """A configuration to verify; ``config.llm.path`` names the LLM, features and texts are random.

    Attributes:
        config: the run's configuration.
        steps: optimiser steps.
        device: of the batches.
    """

    config: RunConfig
    steps: int
    device: torch.device = CPU

    @property
    def widths(self) -> dict[str, int]:
        """Feature width of each stream in use."""
        joined = streams_joined(self.config)
        return {stream: WIDTHS["audio" if joined else stream] for stream in streams_of(self.config)}

    @property
    def views(self) -> list[View]:
        return views_of(self.config)

    def step(self, number: int, dp_rank: int, layout: Layout) -> Step:
        """One data-parallel rank's part of a step, in all views, or with ``task.sampling=rates`` in those that are
        drawn; the batch is cut and padded as in training."""
        size = typical_batch(self.config.data)
        batch = list(range(number * size, (number + 1) * size))
        frames = [_frames(i, "video") for i in batch]
        chunks = share_of_rank(batch, frames, self.config.data.fixed_accumulation, dp_rank, layout.dp)
        views, task = self.views, self.config.task
        if task.sampling == "rates":  # all tasks are there in every step
            views = schedule_of(self.config).of_step(number)
        least = filled_tokens(self.config)
        if layout.virtual > 1:
            least = max(input_tokens(self._laid_out(chunk, views)) for chunk in chunks)
        microbatches = [self.microbatch(chunk, token_multiple(layout), least, views) for chunk in chunks]
        labels = sum(len(_text(i, self._vocabulary)) + 1 for i in batch)
        return Step(microbatches, views, labels, size, dataclasses.asdict(task.weights))

    def microbatch(
        self, numbers: Sequence[int], multiple: int = ALIGNMENT, least: int = 0, views: Sequence[View] | None = None
    ) -> MicroBatch:
        """Some utterances in some views, or in all; their number of tokens as in `TokenContext.of`."""
        return MicroBatch(
            pack(self._laid_out(numbers, views or self.views), None, multiple, least).to(self.device),
            {stream: [_features(n, stream, w).to(self.device) for n in numbers] for stream, w in self.widths.items()},
        )

    def _laid_out(self, numbers: Sequence[int], views: Sequence[View]) -> list[tuple[View, list[Example]]]:
        return [(view, [self.example(number, view) for number in numbers]) for view in views]

    def example(self, number: int, view: View) -> Example:
        """The token sequence of utterance ``number``."""
        tags: Any = TAGS
        ids = [tags["bos"]]
        for stream, placeholder, rate in (("audio", AUDIO, view.audio_rate), ("video", VIDEO, view.video_rate)):
            if rate is not None:
                tokens = compressed_length(_frames(number, stream), rate)
                ids += [tags[stream][0], *[placeholder] * tokens, tags[stream][1]]
        return Example([*ids, tags["prompt"], *_text(number, self._vocabulary), tags["eos"]], len(ids) + 1)

    @property
    def _vocabulary(self) -> int:
        return LLMShape.from_directory(self.config.llm.path).vocabulary


def shrunk(config: RunConfig, directory: Path) -> RunConfig:
    """The configuration with a small random Llama (written to ``directory``) and small modules.

    Counts that a layout divides stay large enough for eight ranks on every axis that the LLM allows: four layers, two
    key-value groups of two heads.
    """
    config = small_modules(config, write_random_llama(directory))
    # A budget of frames gives ranks unequal numbers of utterances; so do eleven in two chunks.
    utterances = 8 if config.data.max_frames is None else 11
    config.data = dataclasses.replace(config.data, batch_size=utterances, max_frames=None, accumulation=2)
    return config


def small_modules(config: RunConfig, llm: Path) -> RunConfig:
    """The configuration with the LLM in a directory and small modules; its batches stay as they are."""
    config = dataclasses.replace(config)
    config.llm = dataclasses.replace(config.llm, path=str(llm), pad_heads=False)
    if (lora := config.llm.lora) is not None:
        config.llm.lora = dataclasses.replace(lora, rank=min(lora.rank or SMALL_RANK, SMALL_RANK), reduction=None)
    audio, video = config.audio_encoder, config.video_encoder
    config.audio_encoder = dataclasses.replace(audio, lora=_small_lora(audio.lora))
    config.video_encoder = dataclasses.replace(video, lora=_small_lora(video.lora))
    config.projector = dataclasses.replace(config.projector, hidden_size=16)
    mome = config.mome
    config.mome = dataclasses.replace(
        mome,
        routed_experts=8 if mome.routed_experts else 0,
        top_k=min(mome.top_k, 3),
        bottleneck=min(mome.bottleneck, 4),
        widths=None if mome.widths is None else [1 + number % 4 for number in range(8)],
    )
    return config


def _small_lora(lora: LoRAConfig | None) -> LoRAConfig | None:
    """Low-rank terms of an encoder with a small rank and the same scale."""
    if lora is None or lora.rank <= SMALL_RANK:
        return lora
    return dataclasses.replace(lora, rank=SMALL_RANK, alpha=lora.alpha * SMALL_RANK / lora.rank)


def write_random_llama(directory: Path, layers: int = 4, heads: int = 4, kv_heads: int = 2, tied: bool = False) -> Path:
    """Save a Llama of a few thousand parameters, large enough in scale that a mistake shows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    generator = torch.Generator().manual_seed(1)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale, offset = (0.1, 1.0) if "norm" in name else (0.15, 0.0)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + offset)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def wake(parts: Iterable[NamedPart], seed: int, config: RunConfig | None = None) -> None:
    """Give what starts at zero values, by global name, so that every path carries a signal.

    Args:
        config: of the run, for experts of unequal widths: units that one lacks stay zero.
    """
    for part in parts:
        if not part.value.any():
            part.value.copy_(part.here(_awake(part.name, part.index, part.whole_shape, seed, config)))


@torch.no_grad()
def wake_reference(model: nn.Module, seed: int, config: RunConfig | None = None) -> None:
    """`wake` for the one-process form."""
    for tensor in layout_free_tensors(model):
        value = tensor.of(tensor.parameter)
        if tensor.parameter.requires_grad and not value.any():
            value.copy_(_awake(tensor.name, None, tensor.shape, seed, config))


def _awake(name: str, index: int | None, shape: tuple[int, ...], seed: int, config: RunConfig | None) -> Tensor:
    """A value for a tensor, or for one row of it along the first dimension."""
    if index is None:
        return torch.stack([_awake(name, number, shape[1:], seed, config) for number in range(shape[0])])
    value = initial_value(f"wake.{name}.{index}.down_weight", (*shape, 16), seed, "uniform")[..., 0]
    widths, (module, _, part_name) = None if config is None else widths_of(config), name.rpartition(".")
    if config is None or widths is None or not module.endswith(("routed", "shared")):
        return value
    (part,) = [part for part in find_form(config.mome.expert).parts if part.name == part_name]
    return narrowed(value, part, widths.routed[index] if module.endswith("routed") else widths.shared)


def _frames(number: int, stream: str) -> int:
    video = int(np.random.default_rng([number, 0]).integers(8, 20))
    return 2 * video if stream == "audio" else video


def _features(number: int, stream: str, width: int) -> Tensor:
    rng = np.random.default_rng([number, 1 if stream == "audio" else 2])
    return torch.tensor(rng.normal(size=(_frames(number, stream), width)), dtype=torch.float32)


def _text(number: int, vocabulary: int) -> Sequence[int]:
    rng = np.random.default_rng([number, 3])
    return rng.integers(FIRST_WORD, vocabulary, size=int(rng.integers(3, 7))).tolist()
