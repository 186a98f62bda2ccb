"""From positions in the training order to the microbatches of one step.

Every rank lays out the token sequences of its part of the batch, from the index alone; only ranks of the first pipeline
stage read encoder features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from mome_dist.aligned_tokens import ViewPair
from mome_dist.data.corpus import Utterance
from mome_dist.data.parts import Parts, Shares, Work, work_of_sequence
from mome_dist.draws import draw_of
from mome_dist.model.distributed import MicroBatch
from mome_dist.parallel.layout import Layout
from mome_dist.speech.cross_rate import align, coarse_tokens, view_pairs
from mome_dist.speech.matryoshka import audio_frames, compressed_length
from mome_dist.speech.sequence import Absent, Example, SequenceBuilder, pack
from mome_dist.speech.views import View, streams_read
from mome_dist.token_context import ALIGNMENT
from mome_dist.transfer import sent_to

FeatureReader = Callable[[str], Tensor]
LeftOut = Callable[[str, View], str | None]
"""Maps an utterance id and a view to the stream whose features are zeroed there, or None."""


@dataclass(frozen=True)
class Step:
    """The microbatches of one optimiser step on one rank.

    Attributes:
        microbatches: one for every part of the batch, in order.
        views: of the step.
        label_tokens: text and end tokens of the global batch, over all ranks; the same in every view.
        utterances: of the global batch.
        task_weights: what the cross-entropy of a view counts for, by task; 1 where nothing is said.
        pairs: of views of which one teaches the other; none where nobody asks.
    """

    microbatches: list[MicroBatch]
    views: list[View]
    label_tokens: int
    utterances: int
    task_weights: Mapping[str, float] = field(default_factory=dict)
    pairs: tuple[ViewPair, ...] = ()

    @property
    def weights(self) -> list[float]:
        """What the cross-entropy of each view counts for."""
        return [self.task_weights.get(view.task, 1.0) for view in self.views]

    @cached_property
    def weights_V(self) -> Tensor:
        """The same, fp32 [V], where the microbatches are."""
        return sent_to(torch.tensor(self.weights), self.microbatches[0].tokens.context.members_VN.device)

    @property
    def tokens(self) -> int:
        """Tokens of this rank in all sequences, dead ones left out."""
        return sum(each.tokens.context.alive for each in self.microbatches)


class BatchBuilder:
    """Builds steps for one data-parallel rank.

    Args:
        utterances: of the split.
        sequences: lays out token sequences.
        features: encoder features by stream ("audio", "video") and utterance id; None on ranks that do not embed.
        parts: how many microbatches a step has.
        attention: share of attention in the work of a token, see `mome_dist.data.parts.work_of_sequence`.
        dp_rank, dp_size: of this rank.
        device: where the microbatches go.
        layout: whose sequence parallelism wants numbers of tokens that tp divides, and whose interleaved schedule wants
            one number of tokens for all microbatches of a step.
        task_weights: of the steps.
        least_tokens: of every microbatch, which dead ones fill up.
        cross_rate: whether to align tokens of fine and coarse views.
        draws: whether tokens have draws for routers.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        sequences: SequenceBuilder,
        features: dict[str, FeatureReader] | None,
        parts: Parts,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
        layout: Layout,
        attention: float = 0.0,
        task_weights: Mapping[str, float] | None = None,
        least_tokens: int = 0,
        cross_rate: bool = False,
        draws: bool = False,
    ) -> None:
        self._utterances, self._sequences, self._features = utterances, sequences, features
        self._left_out: LeftOut | None = None
        self._task_weights = task_weights or {}
        self._parts, self._dp_rank, self._dp_size = parts, dp_rank, dp_size
        self._device, self._layout, self._attention = device, layout, attention
        self._least_tokens, self._cross_rate, self._draws = least_tokens, cross_rate, draws
        self._overhead = lru_cache(maxsize=None)(sequences.overhead)
        self._label_length = lru_cache(maxsize=None)(lambda text: len(sequences.codec.encode(text)) + 1)

    def read_from(self, features: dict[str, FeatureReader]) -> None:
        """Read features from elsewhere from now on."""
        self._features = features

    def leave_out(self, left_out: LeftOut) -> None:
        """Zero the features of streams that utterances go without in a view from now on; on ranks that do not embed,
        their tokens are known to be absent all the same."""
        self._left_out = left_out

    def build(self, batch: Sequence[int], views: Sequence[View], number: int = 0) -> Step:
        """The step that trains on the given utterances (global batch) in the given views.

        Args:
            number: of the step, which what is drawn depends on.
        """
        parts = self._share(batch, views, self._dp_rank)
        laid_out = [[(view, self._examples(part, view)) for view in views] for part in parts]
        multiple = token_multiple(self._layout)
        least = max(map(input_tokens, laid_out)) if self._layout.virtual > 1 else self._least_tokens
        pairs = view_pairs(views) if self._cross_rate else ()
        tokens = coarse_tokens(views, pairs, [self._speech_tokens(batch, view) for view in views]) if pairs else {}
        microbatches = [
            MicroBatch(
                pack(each, self._absent(part), multiple, least, self._drawn(part, number)).to(self._device),
                self._read_features(part, views),
                align(each, pairs, tokens, self._absent(part)).to(self._device) if pairs else None,
            )
            for part, each in zip(parts, laid_out, strict=True)
        ]
        labels = sum(self._label_length(self._utterances[i].text) for i in batch)
        return Step(microbatches, list(views), labels, len(batch), self._task_weights, pairs)

    def own(self, batch: Sequence[int], views: Sequence[View]) -> list[Utterance]:
        """This rank's utterances of a global batch."""
        return [utterance for part in self._share(batch, views, self._dp_rank) for utterance in part]

    def ids(self, batch: Sequence[int]) -> list[str]:
        """Names of the utterances of a batch."""
        return [self._utterances[i].id for i in batch]

    def work(self, batch: Sequence[int], views: Sequence[View]) -> Work:
        """The work of a step on all ranks."""
        frames = {i: self._utterances[i].length for i in batch}
        lengths = {i: self._lengths(i, views) for i in batch}
        tokens = {i: sum(each) for i, each in lengths.items()}
        return Work.of(self._shares(batch, views), frames, tokens, {i: self._work(each) for i, each in lengths.items()})

    def _shares(self, batch: Sequence[int], views: Sequence[View]) -> Shares:
        lengths = [self._lengths(i, views) for i in batch]
        return self._parts.shares(batch, [sum(each) for each in lengths], list(map(self._work, lengths)), self._dp_size)

    def _share(self, batch: Sequence[int], views: Sequence[View], dp_rank: int) -> list[list[Utterance]]:
        """A rank's utterances of a global batch, by microbatch."""
        return [[self._utterances[i] for i in part[dp_rank]] for part in self._shares(batch, views)]

    def _lengths(self, index: int, views: Sequence[View]) -> list[int]:
        """Input tokens of an utterance in each view."""
        utterance = self._utterances[index]
        text = self._label_length(utterance.text) - 1  # the last label is no input
        return [self._overhead(view) + sum(speech_lengths(utterance, view)) + text for view in views]

    def _work(self, lengths: Sequence[int]) -> int:
        return sum(work_of_sequence(length, self._attention) for length in lengths)

    def _examples(self, utterances: Sequence[Utterance], view: View) -> list[Example]:
        return [self._sequences.example(view, *speech_lengths(each, view), each.text) for each in utterances]

    def _speech_tokens(self, batch: Sequence[int], view: View) -> dict[str, int]:
        """Speech tokens of a global batch in a view, by stream."""
        audio, video = zip(*(speech_lengths(self._utterances[i], view) for i in batch), strict=True)
        return {"audio": sum(audio), "video": sum(video)}

    def _absent(self, utterances: Sequence[Utterance]) -> Absent | None:
        left_out = self._left_out
        if left_out is None:
            return None
        return lambda view, clip, stream: left_out(utterances[clip].id, view) == stream

    def _drawn(self, utterances: Sequence[Utterance], number: int) -> list[int] | None:
        """What each clip draws in a step."""
        return [draw_of(number, each.id) for each in utterances] if self._draws else None

    def _read_features(self, utterances: Sequence[Utterance], views: Sequence[View]) -> dict[str, list[Tensor]]:
        if self._features is None:
            return {}
        return {
            stream: [sent_to(self._features[stream](each.id), self._device) for each in utterances]
            for stream in streams_read(views)
        }


def token_multiple(layout: Layout) -> int:
    """What divides the number of tokens of a pass: parts of tensor-parallel ranks are aligned, too."""
    return ALIGNMENT * (layout.tp if layout.sequence_parallel else 1)


def input_tokens(sequences: Sequence[tuple[View, Sequence[Example]]]) -> int:
    """Input tokens of some sequences."""
    return sum(len(example.ids) - 1 for _, examples in sequences for example in examples)


def speech_lengths(utterance: Utterance, view: View) -> tuple[int, int]:
    """Audio and video tokens of an utterance in a view; zero for a stream that the view leaves out."""
    audio = compressed_length(audio_frames(utterance.samples), view.audio_rate) if view.audio_rate is not None else 0
    video = compressed_length(utterance.frames, view.video_rate) if view.video_rate is not None else 0
    return audio, video
