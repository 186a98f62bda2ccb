"""Whole training runs of a small model on the tiny corpus, as users start them, inside forked worlds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mome_dist import evaluate
from mome_dist.config import RunConfig, load_config
from mome_dist.config.derived import streams_of
from mome_dist.data.corpus import Corpus
from mome_dist.data.encoding import load_encoder, split_features
from mome_dist.data.parts import Parts
from mome_dist.inference.load import LoadedRun, load_run
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.tiny import save_llm, tiny_llama, word_tokenizer
from mome_dist.parallel.layout import Layout
from mome_dist.preflight import validate
from mome_dist.speech.video_encoder import VideoEncoder, VideoEncoderConfig
from mome_dist.training.batches import BatchBuilder, FeatureReader, Step
from mome_dist.training.loop import train
from tests.parallel.worlds import run_world
from tests.whisper_directory import whisper_directory

# Small, like the audio encoder: a run that encodes in every step would compute little else.
_VIDEO = VideoEncoderConfig(downsample=4, trunk_widths=(8, 16, 32), width=32, layers=1, heads=2, ffn_width=64)
LAYOUT_KEYS = ("parallel.tp", "parallel.pp", "parallel.ep")


def without_experts(overrides: Sequence[str]) -> bool:
    methods = [override for override in overrides if override.startswith("method=")]
    return "mome=none" in overrides or any(not method.startswith("method=mome") for method in methods)


@dataclass(frozen=True)
class Lab:
    """Frozen models and a corpus to train on, a cache for features, and the experiment that runs are made from."""

    corpus: Path
    llm: Path
    audio_encoder: Path
    video_encoder: Path
    cache: Path
    experiment: str = "tiny"

    @classmethod
    def make(cls, corpus: Path, folder: Path) -> Lab:
        """Random frozen models, small: what is tested is the machinery, not what it learns."""
        opened = Corpus.open(corpus)
        tokenizer = word_tokenizer(utterance.text for name in opened.split_names for utterance in opened.split(name))
        save_llm(tiny_llama(tokenizer, hidden=64, layers=4, ffn_width=96), tokenizer, folder / "llm")
        # The same in every run of the tests: of many encoders, one gives a token whose experts are nearly tied, so that
        # layouts, which differ in the last bits, choose others.
        with torch.random.fork_rng(devices=[]):
            whisper_directory(folder / "audio", width=48)
            VideoEncoder(_VIDEO).save_pretrained(folder / "video")
        return cls(corpus, folder / "llm", folder / "audio", folder / "video", folder / "cache")

    def overrides(self, output: Path, *more: str) -> list[str]:
        """Command-line arguments of a run."""
        return [
            f"experiment={self.experiment}",
            f"data.corpus={self.corpus}",
            f"llm.path={self.llm}",
            *(f"{frozen}.precision=fp32" for frozen in ("llm", "audio_encoder", "video_encoder")),
            f"video_encoder.path={self.video_encoder}",
            f"audio_encoder.path={self.audio_encoder}",
            f"output_dir={output}",
            "data.batch_size=8",
            "data.max_frames=null",
            *(() if without_experts(more) else ("mome.routed_experts=8", "mome.capacity_factor=null")),
            "projector.hidden_size=64",
            "optimizer.warmup_steps=0",
            "training.steps=5",
            "training.epochs=null",
            "training.save_every=0",
            "training.validate_every=0",
            *more,
        ]

    def train(
        self, world: int, output: Path, *more: str, tp: int = 1, pp: int = 1, ep: int = 1, timeout: float = 120.0
    ) -> list[float]:
        """Train in a forked world; return the losses of the steps done."""
        overrides = self.overrides(output, f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.ep={ep}", *more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOME_DIST_CACHE", str(self.cache))
            config = load_config(overrides)  # once for all ranks: it is a fifth of what a short run computes
            losses = run_world(_train, world, config, timeout=timeout)
        assert all(rank == losses[0] for rank in losses), "ranks disagree on the losses"
        return losses[0]


def _train(config: RunConfig) -> list[float]:
    return train(config, validate(config, int(os.environ["WORLD_SIZE"])))


def evaluated(arguments: list[str], cache: Path) -> int:
    """Run the command that evaluates, in a world; return its exit code."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    return evaluate.main(arguments)


def validation_step(run: LoadedRun, dp_rank: int = 0, dp_size: int = 1) -> Step:
    """The validation split in every view, for a run loaded in one process; or a data-parallel rank's share of it."""
    corpus = Corpus.open(run.config.data.corpus)
    features: dict[str, FeatureReader] = {}
    for stream in streams_of(run.config):
        encoder = load_encoder(run.config, stream, run.device)
        features[stream] = split_features(
            run.config, corpus, "validation", stream, encoder, 0, 1, lambda: None, list
        ).get
    utterances, layout = corpus.split("validation"), Layout.for_world(1)
    share = LLMShape.from_directory(run.config.llm.path).attention_share  # ranks get what they get in training
    builder = BatchBuilder(utterances, run.sequences, features, Parts(), dp_rank, dp_size, run.device, layout, share)
    return builder.build(range(len(utterances)), run.views)


def losses_by_view(run: LoadedRun, step: Step) -> dict[str, float]:
    """Mean cross-entropy of a step's labels in each view, by Hugging Face's Llama in one process."""
    sums: dict[str, float] = {}
    with torch.no_grad():
        for batch in step.microbatches:
            logits_LV = run.model.label_logits(batch.tokens, batch.features)
            losses_L = F.cross_entropy(logits_LV, batch.tokens.labels.ids_L, reduction="none")
            # Every view has the same clips, hence the same labels.
            for view, losses in zip(batch.tokens.views, losses_L.chunk(len(batch.tokens.views)), strict=True):
                sums[str(view)] = sums.get(str(view), 0.0) + losses.sum().item() / step.label_tokens
    return sums


def reference_validation(run: Path, cache: Path) -> dict[str, float]:
    """Validation losses of a run's checkpoint, computed by Hugging Face's Llama in one process."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    loaded = load_run(run)
    return losses_by_view(loaded, validation_step(loaded))


def lines(path: Path) -> list[dict]:
    """The records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
