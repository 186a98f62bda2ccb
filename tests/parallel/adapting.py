"""Training with LoRA on both encoders, step by step: as a rank of a run does it, and by plain autograd in one graph."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mome_dist.config import RunConfig, load_config
from mome_dist.config.derived import views_of
from mome_dist.data import encoding
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.encoding import Encoder, load_encoder
from mome_dist.data.parts import Parts
from mome_dist.engine.optimizer import make_optimizer
from mome_dist.llm.shape import LLMShape
from mome_dist.model.shared import build_reference, build_sequences
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.preflight import settled_order, validate
from mome_dist.speech.lora import LoRATerms, attach_lora, lora_layers
from mome_dist.speech.matryoshka import audio_frames
from mome_dist.speech.reference import layout_free_tensors
from mome_dist.speech.video_encoder import VideoEncoder
from mome_dist.training import online
from mome_dist.training.batches import BatchBuilder
from mome_dist.training.run_directory import owned_run
from mome_dist.training.setup import prepare, rank_console
from mome_dist.training.step import forward_backward
from mome_dist.verification.run import Outcome, _array, _named

CPU = torch.device("cpu")


def save_lively_encoder(corpus: Corpus, directory: Path, seed: int = 0) -> None:
    """A random video encoder that tells frames apart. Left as it comes, all frames look alike to its attention, whose
    queries and keys then have gradients that are differences of nearly equal numbers."""
    torch.manual_seed(seed)
    encoder = VideoEncoder()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of all that was seen
    with torch.no_grad():
        encoder.train()([torch.from_numpy(corpus.video(each)) for each in corpus.split("train")[:8]])
        encoder.front_end.projection.bias.zero_()
    encoder.save_pretrained(directory)


def _configured(overrides: Sequence[str], cache: Path, clips_together: int) -> RunConfig:
    """The configuration of a run whose B do not start at zero, where A would have no gradient."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    online.CLIPS_TOGETHER = clips_together

    def attach_awake(encoder: nn.Module, *arguments: Any) -> list[str]:
        names = attach_lora(encoder, *arguments)
        for name, layer in lora_layers(encoder).items():
            with torch.no_grad():
                layer.lora_b.normal_(0, 0.05, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        return names

    encoding.attach_lora = attach_awake  # type: ignore[assignment]
    return load_config(overrides)


def adapt(overrides: Sequence[str], cache: Path, steps: int, clips_together: int) -> Outcome:
    """This rank's part of the first steps of a run."""
    config, outcome = _configured(overrides, cache, clips_together), Outcome()
    layout = validate(config, int(os.environ["WORLD_SIZE"]))
    with parallel_world(layout, config.seed, 60) as at, owned_run(config) as ownership:
        trainer = prepare(config, layout, at, ownership, rank_console())
        assert trainer.online is not None
        for number in range(steps):
            trainer.online.load(number)
            step = trainer.batches["train"].build(trainer.order.batch(number), views_of(config))
            with trainer.engine.accumulate():
                outcome.losses.append(forward_backward(trainer.model.train(), step).loss)
                trainer.online.backward()
            if number == 0:
                outcome.gradients = _named(trainer.model, trainer.engine.gradient)
            trainer.engine.step(config.optimizer.learning_rate)
            outcome.norms.append(trainer.engine.gradient_norm)
        outcome.weights = _named(trainer.model, lambda parameter: parameter.detach())
        trainer.online.close()
    return outcome


def adapt_in_one_graph(overrides: Sequence[str], cache: Path, steps: int, clips_together: int) -> Outcome:
    """The same by autograd from the loss to the encoders' first layers, with Hugging Face's LLM and torch's optimiser:
    nothing here knows of the cut at the features, of Megatron-Core or of DeepSpeed."""
    config, outcome = _configured(overrides, cache, clips_together), Outcome()
    corpus, views = Corpus.open(config.data.corpus), views_of(config)
    encoders = {stream: load_encoder(config, stream, CPU) for stream in ("audio", "video")}
    widths = {stream: encoder.width for stream, encoder in encoders.items()}
    model = build_reference(config, widths, lora=LoRATerms(encoders)).train()
    tensors = (tensor for tensor in layout_free_tensors(model) if tensor.parameter.requires_grad)
    named = {tensor.name: tensor.parameter for tensor in tensors}
    stepper = make_optimizer([{"params": list(named.values())}], config.optimizer)
    utterances, layout = corpus.split("train"), Layout.for_world(1)
    shape = LLMShape.from_directory(config.llm.path)
    order, _ = settled_order(config, utterances, layout)
    builder = BatchBuilder(
        utterances,
        build_sequences(config),
        None,
        Parts(config.data.fixed_accumulation),
        0,
        1,
        CPU,
        layout,
        shape.attention_share,
    )
    for number in range(steps):
        batch = order.batch(number)
        own = builder.own(batch, views)
        features = {
            stream: _encoded(stream, encoder, corpus, own, clips_together) for stream, encoder in encoders.items()
        }
        builder.read_from({stream: found.__getitem__ for stream, found in features.items()})
        step, losses = builder.build(batch, views), []
        for part in step.microbatches:
            loss = model.loss(part.tokens, part.features) / (step.label_tokens * len(views))
            auxiliary = model.auxiliary_loss(config.mome.balance_loss, config.mome.z_loss)
            losses.append((loss, auxiliary / len(step.microbatches)))
        outcome.losses.append(sum(loss.item() for loss, _ in losses))
        torch.stack([loss + auxiliary for loss, auxiliary in losses]).sum().backward()
        if number == 0:
            outcome.gradients = {name: _array(p.grad) for name, p in named.items() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(named.values(), config.optimizer.gradient_clipping)
        outcome.norms.append(norm.item())
        stepper.step()
        stepper.zero_grad()
    outcome.weights = {name: _array(parameter) for name, parameter in named.items()}
    return outcome


def _encoded(
    stream: str, encoder: Encoder, corpus: Corpus, utterances: Sequence[Utterance], clips_together: int
) -> dict[str, Tensor]:
    """Features with their graph, rounded to float16 as by a straight-through estimator, longest clips first."""
    read, found = corpus.audio if stream == "audio" else corpus.video, {}
    rows = audio_frames if stream == "audio" else int
    lengths = {each.id: rows(each.samples if stream == "audio" else each.frames) for each in utterances}
    ordered = sorted(utterances, key=lambda each: (-lengths[each.id], each.id))
    for first in range(0, len(ordered), clips_together):
        together = ordered[first : first + clips_together]
        for each, values in zip(together, encoder([torch.from_numpy(read(u)) for u in together]), strict=True):
            found[each.id] = values + (values.half().float() - values).detach()
    return found
