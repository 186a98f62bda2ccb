"""A tiny random Llama, random speech features and the two forms of the MoME model over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mome_dist.llm.hugging_face import load_hugging_face
from mome_dist.llm.megatron import build_frozen_llm
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.weights import load_weights
from mome_dist.model.distributed import Chunk, DistributedMoME, MicroBatch, attach_mome
from mome_dist.parallel.layout import Layout
from mome_dist.speech.projector import Projectors
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.sequence import AUDIO, VIDEO, Example, pack
from mome_dist.speech.views import View
from mome_dist.token_context import ALIGNMENT
from mome_dist.training.batches import Step
from mome_dist.verification.probe import wake, wake_reference

WIDTHS = {"audio": 12, "video": 10}
RATES = {"audio": [4, 16], "video": [2, 5]}
VIEWS = [View("asr", 4, None), View("vsr", None, 2), View("avsr", 4, 5)]
MOME: dict[str, Any] = {"routed_experts": 8, "top_k": 3, "shared_experts": 1, "bottleneck": 4}
SEED, EMBEDDING_SCALE = 3, 0.5
CPU = torch.device("cpu")


def projectors(hidden_size: int = 32) -> Projectors:
    module = Projectors(WIDTHS, RATES, hidden_size, projector_size=16, per_rate=False, compression="pool")
    module.initialize(SEED, EMBEDDING_SCALE)
    return module


def reference(directory: Path, placement: str, **mome: Any) -> MoMESpeechLM:
    llm = load_hugging_face(directory, torch.float32)
    llm.set_attn_implementation("eager")
    model = MoMESpeechLM(llm, projectors(), placement, **{**MOME, **mome})
    model.initialize(SEED, EMBEDDING_SCALE)
    wake_reference(model, SEED)
    return model.train()


def distributed(
    directory: Path, placement: str, layout: Layout, precision: torch.dtype = torch.float32, **mome: Any
) -> DistributedMoME:
    shape, chunks = LLMShape.from_directory(directory), []
    for number in range(layout.virtual):
        llm = build_frozen_llm(shape, precision, "eager", CPU, layout, number)
        load_weights(llm, shape, directory)
        momes = attach_mome(llm, placement, SEED, ep_size=layout.ep, **{**MOME, **mome})
        chunks.append(Chunk(llm, projectors() if llm.pre_process else None, momes))
    model = DistributedMoME(chunks, layout.ep)
    wake(model.trained_parts(), SEED)
    return model.train()


def utterance(number: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Random features and text of clip ``number``; lengths vary."""
    rng = np.random.default_rng(number)
    frames = int(rng.integers(6, 14))
    audio = torch.tensor(rng.normal(size=(2 * frames, WIDTHS["audio"])), dtype=torch.float32)
    video = torch.tensor(rng.normal(size=(frames, WIDTHS["video"])), dtype=torch.float32)
    return audio, video, [int(token) for token in rng.integers(8, 64, size=int(rng.integers(3, 7)))]


def example(number: int, view: View) -> Example:
    audio, video, text = utterance(number)
    ids = [1]
    if view.audio_rate is not None:
        ids += [4, *[AUDIO] * max(len(audio) // view.audio_rate, 1), 5]
    if view.video_rate is not None:
        ids += [6, *[VIDEO] * max(len(video) // view.video_rate, 1), 7]
    return Example([*ids, 3, *text, 2], len(ids) + 1)


def microbatch(numbers: list[int], views: Sequence[View] = VIEWS) -> MicroBatch:
    sequences = [(view, [example(number, view) for number in numbers]) for view in views]
    clips = [utterance(number) for number in numbers]
    features = {"audio": [audio for audio, _, _ in clips], "video": [video for _, video, _ in clips]}
    return MicroBatch(pack(sequences, multiple=2 * ALIGNMENT), features)  # sequence parallelism halves it


def step_of(batch: list[int], dp_rank: int, dp_size: int, accumulation: int = 2) -> Step:
    from mome_dist.data.order import share_of_rank

    chunks = share_of_rank(batch, [len(utterance(number)[1]) for number in batch], accumulation, dp_rank, dp_size)
    labels = sum(len(utterance(number)[2]) + 1 for number in batch)
    return Step([microbatch(chunk) for chunk in chunks], VIEWS, labels, len(batch))
