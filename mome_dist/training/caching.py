"""Command: encode the splits of a corpus once, with all ranks, and say what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mome_dist.config.derived import streams_of
from mome_dist.config.schema import RunConfig
from mome_dist.data.corpus import Corpus
from mome_dist.data.encoding import load_encoder, split_features
from mome_dist.data.media import FPS, SAMPLE_RATE
from mome_dist.parallel.plain_world import World
from mome_dist.preflight import check_geometry
from mome_dist.training.precision import settle_precision


@dataclass(frozen=True)
class Cached:
    """The features of one split through one encoder.

    Attributes:
        stream, split: of what.
        utterances: that the store holds now.
        encoded: how many of them this command encoded.
        damaged: utterances that cannot be read.
        bytes: of the store.
        speech_seconds: of the utterances that this command encoded.
        seconds: that it took, all ranks working.
        directory: of the store.
    """

    stream: str
    split: str
    utterances: int
    encoded: int
    damaged: int
    bytes: int
    speech_seconds: float
    seconds: float
    directory: str

    @property
    def speed(self) -> float | None:
        """Seconds of speech encoded in a second; None where nothing was encoded."""
        return self.speech_seconds / self.seconds if self.encoded else None


def cache_features(config: RunConfig, splits: Sequence[str] | None, world: World, console: Console) -> list[Cached]:
    """Encode what the store lacks, and print a summary on rank 0.

    Args:
        config: of a run; its corpus, encoders, tasks (which say the streams) and ``data.features_dir`` count.
        splits: to encode; None for those that training reads.
        world: every rank must call this with the same arguments.
        console: quiet on all ranks but 0.

    Raises:
        UserError: for a missing encoder, corpus or split, or crops of another geometry than the encoder expects.
    """
    config = settle_precision(config, console)
    corpus = Corpus.open(config.data.corpus)
    names = list(dict.fromkeys(splits or (config.data.train_split, config.data.validation_split)))
    for name in names:
        corpus.split(name)
    results = []
    if "video" in streams_of(config):
        check_geometry(config.video_encoder.path, corpus)
    for stream in streams_of(config):
        encoder = load_encoder(config, stream, world.device)
        for split in names:
            started = time.monotonic()
            store = split_features(
                config, corpus, split, stream, encoder, world.rank, world.size, world.barrier, world.share, console
            )
            per_second = SAMPLE_RATE if stream == "audio" else FPS
            lengths = {u.id: (u.samples if stream == "audio" else u.frames) / per_second for u in corpus.split(split)}
            results.append(
                Cached(
                    stream,
                    split,
                    utterances=len(store),
                    encoded=len(store.encoded),
                    damaged=len(store.damaged),
                    bytes=store.size(),
                    speech_seconds=sum(lengths[name] for name in store.encoded),
                    seconds=time.monotonic() - started,
                    directory=str(store.directory),
                )
            )
    _print(results, console)
    return results


def _print(results: Sequence[Cached], console: Console) -> None:
    table = Table(title="features")
    for heading in ("stream", "split", "utterances", "new", "damaged", "MB", "speech s", "took s", "x real time"):
        table.add_column(heading, justify="left" if heading in ("stream", "split") else "right", no_wrap=True)
    for each in results:
        table.add_row(
            each.stream,
            each.split,
            f"{each.utterances:,}",
            f"{each.encoded:,}",
            str(each.damaged),
            f"{each.bytes / 1e6:.1f}",
            f"{each.speech_seconds:.0f}",
            f"{each.seconds:.1f}",
            "-" if each.speed is None else f"{each.speed:.1f}",
        )
    console.print(table)
    for directory in dict.fromkeys(each.directory for each in results):
        console.print(directory, soft_wrap=True)
