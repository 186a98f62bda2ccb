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
from mome_dist.parallel.model import MicroBatch
from mome_dist.speech.matryoshka import audio_frames, compressed_length
from mome_dist.speech.sequence import SequenceBuilder, TokenBatch, collate
from mome_dist.speech.views import View

FeatureReader = Callable[[str], Tensor]


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
    ) -> None:
        self._utterances, self._sequences, self._features = utterances, sequences, features
        self._accumulation, self._dp_rank, self._dp_size, self._device = accumulation, dp_rank, dp_size, device
        self._label_length = lru_cache(maxsize=None)(lambda text: len(sequences.codec.encode(text)) + 1)

    def build(self, batch: Sequence[int], views: Sequence[View]) -> Step:
        """The step that trains on the given utterances (global batch) in the given views."""
        chunks = share_of_rank(batch, self._accumulation, self._dp_rank, self._dp_size)
        microbatches = [
            self.microbatch([self._utterances[i] for i in chunk], view) for view in views for chunk in chunks
        ]
        labels = sum(self._label_length(self._utterances[i].text) for i in batch)
        return Step(microbatches, list(views), labels)

    def microbatch(self, utterances: Sequence[Utterance], view: View) -> MicroBatch:
        """One forward pass over some utterances."""
        return MicroBatch(
            view=view,
            tokens=self._tokens(utterances, view).to(self._device),
            audio=list(self._read("audio", utterances)) if view.audio_rate is not None else [],
            video=list(self._read("video", utterances)) if view.video_rate is not None else [],
        )

    def mean_tokens(self, batch: Sequence[int], views: Sequence[View]) -> int:
        """Positions of a microbatch of the first data-parallel rank, padding included: the mean over views of a global
        batch, the same on all ranks."""
        chunks = share_of_rank(batch, self._accumulation, 0, self._dp_size)
        parts = [[self._utterances[i] for i in chunk] for chunk in chunks]
        sizes = [self._tokens(part, view).ids_BS.numel() for view in views for part in parts]
        return sum(sizes) // len(sizes)

    def _tokens(self, utterances: Sequence[Utterance], view: View) -> TokenBatch:
        return collate([self._sequences.example(view, *speech_lengths(each, view), each.text) for each in utterances])

    def _read(self, stream: str, utterances: Sequence[Utterance]) -> Iterator[Tensor]:
        if self._features is not None:
            for utterance in utterances:
                yield self._features[stream](utterance.id).to(self._device)


def speech_lengths(utterance: Utterance, view: View) -> tuple[int, int]:
    """Audio and video tokens of an utterance in a view; zero for a stream that the view leaves out."""
    audio = compressed_length(audio_frames(utterance.samples), view.audio_rate) if view.audio_rate is not None else 0
    video = compressed_length(utterance.frames, view.video_rate) if view.video_rate is not None else 0
    return audio, video
