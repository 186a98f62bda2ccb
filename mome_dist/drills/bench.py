"""Where drills run: a small run's configuration, its folders, and worlds of forked ranks that end as commands do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mome_dist import train
from mome_dist.config import RunConfig, load_config
from mome_dist.config.derived import layout_of
from mome_dist.config.load import load_training
from mome_dist.config.models import settle_models
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.order import order_of
from mome_dist.data.synthetic import SyntheticSettings, generate_corpus
from mome_dist.drills.injection import FAULT, READY, Injection, install
from mome_dist.errors import UserError
from mome_dist.launchers.ranks import Outcome, RankGroup
from mome_dist.llm.tiny import save_llm, tiny_llama, word_tokenizer
from mome_dist.parallel.forked import fork_ranks
from mome_dist.speech.video_encoder import VideoEncoder
from mome_dist.text_files import lines_of

STEPS, SAVE_EVERY = 6, 2
WORLD_SECONDS = 300.0  # only a world that hangs reaches it
CORPUS = SyntheticSettings(train=24, validation=4, test=4, train_speakers=8, validation_speakers=4, test_speakers=4)


@dataclass(frozen=True)
class Ended:
    """How one world ended.

    Attributes:
        outcome: as the launcher sees it.
        text: what the ranks printed.
        ready: when it began its first step (seconds since 1970), None if it never did.
        fault: when the first fault happened, likewise.
    """

    outcome: Outcome
    text: str
    ready: float | None
    fault: float | None


@dataclass
class Bench:
    """Configuration and folders of the runs of a drill.

    Attributes:
        overrides: of every run.
        processes: of an ordinary one.
        folder: scratch.
    """

    overrides: list[str]
    processes: int
    folder: Path
    _starts: int = field(default=0, init=False)

    @classmethod
    def make(cls, overrides: Sequence[str], processes: int, folder: Path, shrink: bool) -> Bench:
        """Prepare runs of the user's configuration, or with ``shrink`` of one with a small random LLM and corpus.

        Raises:
            UserError: for a wrong configuration.
        """
        if processes < 2:
            raise UserError(f"--nproc is {processes}: drills need at least two processes, one to lose.")
        chosen = [*overrides]
        if shrink:
            chosen += _shrinking(folder, load_config(overrides).mome.spread > 0)
        fixed = [
            "training.epochs=null",
            "training.validate_every=0",
            "training.log_utterances=true",
            # A run that was mended encodes in other batches, whose bf16 features are others by a rounding.
            "audio_encoder.precision=fp32",
            "video_encoder.precision=fp32",
        ]
        config = load_training(chosen)
        layout_of(config, processes)
        if config.mome.experts:
            # Nothing of what only some layouts have: a run may go on at half of the ranks.
            fixed += ["mome.capacity_factor=null", "mome.drop_policy=probs", "mome.alltoall_nodes=1"]
        return cls([*chosen, *fixed, *settle_models(config)], processes, folder)

    def config(self, *more: str) -> RunConfig:
        """The configuration of a run."""
        return load_config([*self.overrides, *more])

    def halved(self) -> list[str]:
        """Overrides for a layout on half the processes: the first of ep, tp and pp that can be halved is.

        Raises:
            UserError: if no layout fits half the processes.
        """
        parallel = self.config().parallel
        for axis in (None, "ep", "tp", "pp"):
            changed = [] if axis is None else [f"parallel.{axis}={max(1, getattr(parallel, axis) // 2)}"]
            try:
                layout_of(self.config(*changed), self.processes // 2)
            except UserError:
                continue
            return changed
        raise UserError(f"no layout on {self.processes // 2} processes: give an even --nproc.")

    def start(self, processes: int, overrides: Sequence[str], cache: Path, injections: Sequence[Injection]) -> Ended:
        """Run one world to its end."""
        self._starts += 1
        notes = self.folder / f"start-{self._starts:03d}"
        notes.mkdir()
        # A limit on file sizes or a signal's handler must not outlive a world: every world has processes of its own.
        ranks = fork_ranks(_rank, processes, [*self.overrides, *overrides], cache, injections, notes, logs=notes)
        with RankGroup() as group:
            group.follow(ranks)
            outcome = group.wait(WORLD_SECONDS)
        text = "\n".join(path.read_text(errors="replace") for path in sorted(notes.glob("rank-*.log")))
        return Ended(outcome, text, _time(notes / READY), _time(notes / FAULT))

    def trained_in_step(self, step: int) -> list[Utterance]:
        """The utterances of a step, counted from one, each once."""
        config = self.config()
        data, utterances = config.data, Corpus.open(config.data.corpus).split(config.data.train_split)
        order = order_of(utterances, data.batch_size, data.max_frames, data.bucket_batches, config.seed)
        return [utterances[index] for index in dict.fromkeys(order.batch(step - 1))]

    def damaged_corpus(self, name: str, shard: str) -> tuple[Path, Path]:
        """A copy of the corpus of which a shard may be damaged; other files are links. Returns both."""
        source = Path(self.config().data.corpus)
        copy = self.folder / "corpora" / name
        copy.mkdir(parents=True)
        for path in source.iterdir():
            if path.name == shard:
                shutil.copyfile(path, copy / shard)
            else:
                (copy / path.name).symlink_to(path.resolve())
        return copy, copy / shard


def _time(path: Path) -> float | None:
    return float(path.read_text()) if path.exists() else None


def _rank(overrides: list[str], cache: Path, injections: Sequence[Injection], notes: Path) -> int:
    os.environ["MOME_DIST_CACHE"] = str(cache)
    install(injections, notes)
    return train.main(overrides)


def _shrinking(folder: Path, experts: bool) -> list[str]:
    """Make a small corpus and random models; return the overrides that use them.

    Args:
        experts: whether the run has any that are spread, to be made fewer.
    """
    corpus = generate_corpus(CORPUS, folder / "corpora" / "whole", workers=1)
    opened = Corpus.open(corpus)
    tokenizer = word_tokenizer(utterance.text for name in opened.split_names for utterance in opened.split(name))
    save_llm(tiny_llama(tokenizer, hidden=64, layers=4, ffn_width=96), tokenizer, folder / "llm")
    VideoEncoder().save_pretrained(folder / "video")
    return [
        f"data.corpus={corpus}",
        f"llm.path={folder / 'llm'}",
        "llm.precision=fp32",
        f"video_encoder.path={folder / 'video'}",
        "task=vsr",
        "task.views_per_step=null",
        "data.batch_size=8",
        "data.max_frames=null",
        *(["mome.routed_experts=8", "mome.dispatch=alltoall"] if experts else []),
        "projector.hidden_size=64",
        "optimizer.warmup_steps=0",
    ]


def records(path: Path) -> list[dict]:
    """The records of a JSON-lines file; none if there is no such file."""
    return [json.loads(line) for line in lines_of(path)] if path.is_file() else []
