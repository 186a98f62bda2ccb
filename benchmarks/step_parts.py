"""A training step of the frozen LLM on random clips, with MoME or with projectors only, and its parts timed."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measuring import CPU, DTYPES, Stopwatch, interleaved, median_milliseconds, meet, slowest, total
from benchmarks.step_peer import PeftStep
from mome_dist.config.schema import OptimizerConfig
from mome_dist.engine.engine import Engine
from mome_dist.llm.megatron import build_frozen_llm
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.tensors import embedding_scale
from mome_dist.llm.weights import load_weights
from mome_dist.model.distributed import Chunk, DistributedMoME, MicroBatch, attach_mome
from mome_dist.parallel.layout import Layout
from mome_dist.paths import configs_dir
from mome_dist.speech.matryoshka import compressed_length
from mome_dist.speech.projector import Projectors
from mome_dist.speech.sequence import AUDIO, VIDEO, Example, pack
from mome_dist.speech.views import View, streams_read
from mome_dist.token_context import ALIGNMENT
from mome_dist.training.batches import Step
from mome_dist.training.step import forward_backward

FORMS = ("projectors", "mome")
PARTS = ("forward and backward", "gradient reduction", "optimiser step")
WIDTHS, FRAMES_PER_SECOND = {"audio": 384, "video": 128}, {"audio": 50, "video": 25}
PROJECTOR_SIZE = 512
RATES = {"audio": [4, 16], "video": [2, 5]}
# The longest and one of the shortest views of a step of two.
VIEWS = [View("avsr", 4, 2), View("vsr", None, 5)]
CLIP_SECONDS, TEXT_TOKENS, PROMPT_TOKENS = (2.0, 3.0), 9, 10


@dataclass(frozen=True)
class Trained:
    """A model and its engine."""

    model: DistributedMoME
    engine: Engine


def build(form: str, options: argparse.Namespace, layout: Layout) -> Trained:
    """The frozen LLM with projectors; "mome" also has a MoME module in every layer."""
    shape = LLMShape.from_directory(options.llm)
    llm = build_frozen_llm(shape, DTYPES[options.precision], "auto", CPU, layout)
    load_weights(llm, shape, options.llm)
    projectors = Projectors(WIDTHS, RATES, shape.hidden_size, PROJECTOR_SIZE, per_rate=False, compression="pool")
    projectors.initialize(0, embedding_scale(options.llm))
    momes = {}
    if form == "mome":
        momes = attach_mome(
            llm,
            "ffn",
            seed=0,
            routed_experts=options.experts,
            top_k=4,
            shared_experts=1,
            bottleneck=options.bottleneck,
            ep_size=layout.ep,
            dispatch="gather" if layout.ep > 1 else "local",
        )
    model = DistributedMoME([Chunk(llm, projectors, momes)], layout.ep if momes else None).train()
    settings = json.loads((configs_dir() / "deepspeed" / "zero1.json").read_text())
    return Trained(model, Engine(model, OptimizerConfig(), settings))


def random_step(options: argparse.Namespace, number: int) -> Step:
    """A microbatch of random clips in all views; the same on every rank, so that all have the same work."""
    clips = options.clips * dist.get_world_size()
    return Step([microbatch(VIEWS, _seconds(options, number))], VIEWS, (TEXT_TOKENS + 1) * clips, clips)


def _seconds(options: argparse.Namespace, number: int) -> list[float]:
    drawn = random.Random(number)
    return [drawn.uniform(*CLIP_SECONDS) for _ in range(options.clips)]


def microbatch(
    views: Sequence[View],
    seconds: Sequence[float],
    text_tokens: int = TEXT_TOKENS,
    prompt_tokens: int = PROMPT_TOKENS,
    multiple: int = ALIGNMENT,
) -> MicroBatch:
    """Random clips of some lengths in some views; token ids are below ten and below the text's length.

    Args:
        multiple: of tokens, see `mome_dist.token_context.TokenContext.of`.
    """
    sequences, features = clips_of(views, seconds, text_tokens, prompt_tokens)
    return MicroBatch(pack(sequences, multiple=multiple), features)


def clips_of(
    views: Sequence[View], seconds: Sequence[float], text_tokens: int = TEXT_TOKENS, prompt_tokens: int = PROMPT_TOKENS
) -> tuple[list[tuple[View, list[Example]]], dict[str, list[Tensor]]]:
    """Sequences of every view, and random features of each stream, for clips of some lengths."""
    sequences = [(view, [_example(view, clip, text_tokens, prompt_tokens) for clip in seconds]) for view in views]
    features = {
        stream: [torch.randn(_frames(stream, clip), WIDTHS[stream]) for clip in seconds]
        for stream in streams_read(views)
    }
    return sequences, features


def _example(view: View, seconds: float, text_tokens: int, prompt_tokens: int) -> Example:
    ids = [1]
    for stream, rate, placeholder in (("audio", view.audio_rate, AUDIO), ("video", view.video_rate, VIDEO)):
        if rate is not None:
            ids += [2, *[placeholder] * compressed_length(_frames(stream, seconds), rate), 3]
    ids += [4] * prompt_tokens
    return Example([*ids, *range(5, 5 + text_tokens), 0], len(ids))


def _frames(stream: str, seconds: float) -> int:
    return int(seconds * FRAMES_PER_SECOND[stream])


def timed_step(trained: Trained, step: Step) -> list[float]:
    """Seconds of each of `PARTS`, and of the whole step; of the slowest rank."""
    meet()
    watch = Stopwatch(CPU)
    with trained.engine.accumulate():
        forward_backward(trained.model, step)
        watch.mark()
    watch.mark()
    trained.engine.step(1e-5)
    watch.mark()
    parts = watch.parts()
    return [each.device for each in slowest([*parts, total(parts)])]


def measure_steps(options: argparse.Namespace, layout: Layout) -> dict[str, Any]:
    """Median milliseconds of every part of both forms' steps, which take turns; the slowest rank counts.

    In one process, transformers with PEFT takes its turns too.
    """
    forms = {form: build(form, options, layout) for form in FORMS}
    peer = None
    if dist.get_world_size() == 1:
        peer = PeftStep(options.llm, WIDTHS, PROJECTOR_SIZE, DTYPES[options.precision])
    rounds: dict[str, list[list[float]]] = {form: [] for form in FORMS}
    peers: list[float] = []
    for number in range(options.warm_up + options.rounds):
        step = random_step(options, number)
        counts = number >= options.warm_up
        for form, trained in forms.items():
            seconds = timed_step(trained, step)
            if counts:
                rounds[form].append(seconds)
        if peer is not None:
            clips = clips_of(VIEWS, _seconds(options, number))
            (timing,) = interleaved({"peft": partial(peer, *clips)}, rounds=1, warm_up=0)["peft"]
            if counts:
                peers.append(timing.device)
    (batch,) = random_step(options, 0).microbatches
    return {
        "processes": dist.get_world_size(),
        "tokens": dict(zip(map(str, VIEWS), batch.tokens.context.sizes_V2[:, 0].tolist(), strict=True)),
        "trained parameters": {
            form: sum(p.numel() for p in trained.model.trainable_modules().parameters())
            for form, trained in forms.items()
        },
        "peer": peer and {"milliseconds": median_milliseconds(peers), "trained parameters": peer.parameters},
        "milliseconds": {
            form: {
                part: median_milliseconds(list(times))
                for part, times in zip((*PARTS, "step"), zip(*rounds[form], strict=True), strict=True)
            }
            for form in FORMS
        },
    }
