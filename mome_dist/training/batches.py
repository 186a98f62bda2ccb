"""From positions in the training order to the microbatches of one step.

Every rank lays out the token sequences of its part of the batch, from the index alone; only ranks of the first pipeline
stage read encoder features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mome_dist.data.corpus import Utterance
from mome_dist.data.order import share_of_rank
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.model import MicroBatch
from mome_dist.speech.matryoshka import audio_frames, compressed_length
from mome_dist.speech.sequence import Example, SequenceBuilder, collate, longest_input
from mome_dist.speech.views import View

FeatureReader = Callable[[str], Tensor]
LeftOut = Callable[[str, View], str | None]
"""Maps an utterance id and a view to the stream whose features are zeroed there, or None."""


@dataclass(frozen=True)
class Step:
    """The microbatches of one optimiser step on one rank.

    Attributes:
        microbatches: one for every view and chunk, in order.
        views: of the step.
        label_tokens: text and end tokens of the global batch, over all ranks; the same in every view.
    """

    microbatches: list[MicroBatch]
    views: list[View]
    label_tokens: int


class BatchBuilder:
    """Builds steps for one data-parallel rank.

    Args:
        utterances: of the split.
        sequences: lays out token sequences.
        features: encoder features by stream ("audio", "video") and utterance id; None on ranks that do not embed.
        accumulation: chunks that a global batch is cut into.
        dp_rank, dp_size: of this rank.
        device: where the microbatches go.
        layout: whose sequence parallelism wants lengths that tp divides, and whose interleaved schedule wants one
            length and one number of sequences for all microbatches of a step.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        sequences: SequenceBuilder,
        features: dict[str, FeatureReader] | None,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
        layout: Layout,
    ) -> None:
        self._utterances, self._sequences, self._features = utterances, sequences, features
        self._left_out: LeftOut | None = None
        self._accumulation, self._dp_rank, self._dp_size = accumulation, dp_rank, dp_size
        self._device, self._layout = device, layout
        self._label_length = lru_cache(maxsize=None)(lambda text: len(sequences.codec.encode(text)) + 1)

    def read_from(self, features: dict[str, FeatureReader], left_out: LeftOut) -> None:
        """Read features from elsewhere from now on, and zero those of streams that utterances go without in a view."""
        self._features, self._left_out = features, left_out

    def build(self, batch: Sequence[int], views: Sequence[View]) -> Step:
        """The step that trains on the given utterances (global batch) in the given views."""
        parts = [(chunk, view) for view in views for chunk in self._share(batch, self._dp_rank)]
        examples = [self._examples(*part) for part in parts]
        one_shape = self._layout.virtual > 1
        longest = max(map(longest_input, examples)) if one_shape else 0
        rows = max(map(len, examples)) if one_shape else 0
        microbatches = [
            self._microbatch(*part, each, longest, rows) for part, each in zip(parts, examples, strict=True)
        ]
        labels = sum(self._label_length(self._utterances[i].text) for i in batch)
        return Step(microbatches, list(views), labels)

    def own(self, batch: Sequence[int]) -> list[Utterance]:
        """This rank's utterances of a global batch."""
        return [utterance for chunk in self._share(batch, self._dp_rank) for utterance in chunk]

    def ids(self, batch: Sequence[int]) -> list[str]:
        """Names of the utterances of a batch."""
        return [self._utterances[i].id for i in batch]

    def mean_tokens(self, batch: Sequence[int], views: Sequence[View]) -> int:
        """Positions of a microbatch of the first data-parallel rank, padding included: the mean over views of a global
        batch, the same on all ranks."""
        parts = self._share(batch, 0)
        sizes = [longest_input(self._examples(part, view)) * len(part) for view in views for part in parts]
        return sum(sizes) // len(sizes)

    def _share(self, batch: Sequence[int], dp_rank: int) -> list[list[Utterance]]:
        """A rank's utterances of a global batch, by chunk."""
        lengths = [self._utterances[i].length for i in batch]
        shares = share_of_rank(batch, lengths, self._accumulation, dp_rank, self._dp_size)
        return [[self._utterances[i] for i in chunk] for chunk in shares]

    def _examples(self, utterances: Sequence[Utterance], view: View) -> list[Example]:
        return [self._sequences.example(view, *speech_lengths(each, view), each.text) for each in utterances]

    def _microbatch(
        self, utterances: Sequence[Utterance], view: View, examples: Sequence[Example], longest: int, rows: int
    ) -> MicroBatch:
        """One forward pass over some utterances, padded to at least ``longest`` tokens and ``rows`` sequences."""
        length = max(longest, longest_input(examples))
        if self._layout.sequence_parallel:
            length += -length % self._layout.tp
        return MicroBatch(
            view=view,
            tokens=collate(examples, length, rows).to(self._device),
            audio=list(self._read("audio", utterances, view)) if view.audio_rate is not None else [],
            video=list(self._read("video", utterances, view)) if view.video_rate is not None else [],
        )

    def _read(self, stream: str, utterances: Sequence[Utterance], view: View) -> Iterator[Tensor]:
        if self._features is not None:
            for utterance in utterances:
                features = self._features[stream](utterance.id).to(self._device)
                absent = self._left_out is not None and self._left_out(utterance.id, view) == stream
                yield torch.zeros_like(features) if absent else features


def speech_lengths(utterance: Utterance, view: View) -> tuple[int, int]:
    """Audio and video tokens of an utterance in a view; zero for a stream that the view leaves out."""
    audio = compressed_length(audio_frames(utterance.samples), view.audio_rate) if view.audio_rate is not None else 0
    video = compressed_length(utterance.frames, view.video_rate) if view.video_rate is not None else 0
    return audio, video
