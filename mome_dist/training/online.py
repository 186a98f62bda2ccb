"""Encoding inside the training step: clips are decoded ahead, augmented, and encoded by the first pipeline stage.

The cached way reads features that were made once from clean clips; what changes from epoch to epoch needs the encoders
in the loop. Each tensor-parallel rank of the first stage decodes and encodes a share of its data-parallel rank's clips,
once for all views of the step; the features then travel to the others, so that all hold the same bits. They are rounded
to float16 as cached ones are: without augmentation, a clip has the features of the cache wherever the encoder sees it
in a batch of the same shape.

On a GPU, frozen encoders work a step ahead, beside the passes of the current one (`mome_dist.training.ahead`): the same
clips in the same batches, so the same bits. On a CPU both would share the same cores.

Of encoders with LoRA, `mome_dist.training.adaptation` takes the gradients of the features on into A and B.

What happens to a clip is a pure function of (seed, utterance id, epoch), whatever the layout, and after a resume.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mome_dist.data.corpus import Utterance
from mome_dist.data.encoding import Encoder
from mome_dist.data.features import to_float16
from mome_dist.data.prefetch import ClipLoader, Wanted
from mome_dist.data.transforms import ModalityDropout
from mome_dist.errors import UserError
from mome_dist.speech.matryoshka import audio_frames
from mome_dist.speech.views import View
from mome_dist.training.adaptation import Adaptation, StreamFeatures
from mome_dist.training.ahead import Ahead
from mome_dist.training.batches import FeatureReader
from mome_dist.training.noise_log import NoiseLog

CLIPS_TOGETHER = 8  # that an encoder is given at once; bounds its memory


@dataclass(frozen=True)
class StepClips:
    """What a step needs on this data-parallel rank.

    Attributes:
        utterances: of its part of the batch, in any order.
        streams: that the views of the step read.
        draw: of their augmentation: the epoch in which the step begins.
    """

    utterances: Sequence[Utterance]
    streams: Sequence[str]
    draw: int


@dataclass(frozen=True)
class _Share:
    """What this rank has encoded of a step.

    Attributes:
        features: by stream and utterance id, float16.
        noise: that its clips are heard in.
        waited: seconds that clips had to be waited for.
    """

    features: StreamFeatures
    noise: Sequence[Mapping[str, Any]]
    waited: float


class StepFeatures:
    """The features of the clips of the current step, for the batch builder to read.

    Args:
        dropout: of streams in audio-visual views.
    """

    def __init__(self, dropout: ModalityDropout) -> None:
        self._dropout, self._draw, self._step = dropout, 0, 0
        self._features: StreamFeatures = {}

    def begin(self, step: int, draw: int) -> None:
        """Be told the step, and the draw of its augmentation."""
        self._step, self._draw = step, draw

    def hold(self, features: StreamFeatures) -> None:
        """Take the features of the step, by stream and utterance id."""
        self._features = features

    def reader(self, stream: str) -> FeatureReader:
        """Reads the features of a stream, [T, width]: float16, or fp32 leaves of an adapted encoder."""
        return lambda utterance_id: self._features[stream][utterance_id]

    def left_out(self, utterance_id: str, view: View) -> str | None:
        """The stream that an utterance goes without in a view, if any."""
        if view.audio_rate is None or view.video_rate is None:
            return None
        return self._dropout.left_out(utterance_id, str(view), self._draw, self._step)


class OnlineEncoding:
    """Makes the features of one step after the other; every rank has one, those of later pipeline stages an idle one.

    Args:
        held: where the features of the current step are put.
        loader: of raw clips.
        encoders: by stream, frozen but for their LoRA; none on later pipeline stages.
        plan: what a step needs.
        steps: of the run; nothing is read ahead beyond them.
        group: the tensor-parallel ranks.
        device: of the encoders.
        adaptation: trains their LoRA; None leaves the encoders as they are.
        noise_log: of the noise that clips are heard in; None keeps none.
        ahead: whether the next step is encoded beside the current one, and not when it is loaded. Encoders that train
            cannot work ahead.
    """

    def __init__(
        self,
        held: StepFeatures,
        loader: ClipLoader,
        encoders: Mapping[str, Encoder],
        plan: Callable[[int], StepClips],
        steps: int,
        group: dist.ProcessGroup,
        device: torch.device,
        adaptation: Adaptation | None = None,
        noise_log: NoiseLog | None = None,
        ahead: bool = False,
    ) -> None:
        assert adaptation is None or not ahead, "the next step's encoder is not there before this step's update"
        self._held, self._loader, self._encoders, self._plan = held, loader, encoders, plan
        self._steps, self._group, self._device = steps, group, device
        self._adaptation, self._noise_log = adaptation, noise_log
        self._ahead = Ahead[_Share](device) if ahead else None
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def load(self, step: int) -> float:
        """Make the features of a step and begin to read the clips of the next one; every rank of the world calls it.

        Returns:
            The seconds that clips had to be waited for, or that the encoders had to be waited for where they work
            ahead.

        Raises:
            UserError: on all ranks, if a clip cannot be read on one of them, or an encoder gives values that float16
                cannot hold.
        """
        waited, error = 0.0, None
        encoded: StreamFeatures = {}
        clips = self._plan(step)
        self._held.begin(step, clips.draw)
        if self._encoders:
            if self._adaptation is not None:
                self._adaptation.begin()
            try:
                share = self._taken(clips, step)
                waited, encoded = share.waited, share.features
                if self._noise_log is not None:
                    self._noise_log.step(step + 1, share.noise)
            except UserError as problem:
                error = problem
        # Before anything that other ranks would wait for.
        self._stop_together(error)
        if self._encoders:
            if self._size > 1:
                encoded = {s: self._exchange(s, self._shares(clips, s), mine) for s, mine in encoded.items()}
            if self._adaptation is not None:
                encoded = self._adaptation.watch(encoded)
            self._held.hold(encoded)
        return waited

    def load_ahead(self, step: int) -> None:
        """Begin to make the features of the next step; called when the features of the current one have been read, and
        before its passes. Does nothing where encoders do not work ahead."""
        if self._ahead is not None and self._encoders and step < self._steps:
            self._ahead.begin(step, self._work(self._plan(step), step))

    def backward(self) -> None:
        """After the backward passes of a step: go on into the LoRA of the encoders, where they train."""
        if self._adaptation is not None:
            self._adaptation.backward()

    def _stop_together(self, error: UserError | None) -> None:
        """Raise an error of this rank, or else the first of another one."""
        failed = torch.tensor([error is not None], dtype=torch.int32, device=self._device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if not failed.item():
            return
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, None if error is None else str(error))
        rank, reason = next((rank, reason) for rank, reason in enumerate(found) if reason is not None)
        raise error or UserError(f"rank {rank}: {reason}")

    def _taken(self, clips: StepClips, step: int) -> _Share:
        """This rank's share of a step: encoded ahead, or now."""
        if self._ahead is None:
            return self._work(clips, step)()
        began = time.monotonic()
        share = self._ahead.take(step, self._work(clips, step))
        return dataclasses.replace(share, waited=time.monotonic() - began)

    def _work(self, clips: StepClips, step: int) -> Callable[[], _Share]:
        """What encodes this rank's share of a step, on any thread; plans are made here, on the caller's."""
        following = self._wanted(self._plan(step + 1)) if step + 1 < self._steps else []
        return functools.partial(self._encoded, clips, self._wanted(clips), following)

    def _encoded(self, clips: StepClips, wanted: Sequence[Wanted], following: Sequence[Wanted]) -> _Share:
        taken, waited = self._loader.take(wanted)
        self._loader.start(following)
        raw = {(stream, utterance.id): clip.samples for (stream, utterance, _), clip in zip(wanted, taken, strict=True)}
        features = {}
        for stream in clips.streams:
            share = self._shares(clips, stream)[self._rank]
            # Some transforms give views with negative strides, which torch does not take.
            own = [torch.from_numpy(np.ascontiguousarray(raw[stream, utterance.id])) for utterance in share]
            features[stream] = self._encode(stream, share, own)
        noise = [clip.noise for clip in taken if clip.noise is not None]
        return _Share(features, noise, waited)

    def close(self) -> None:
        """Stop reading and encoding ahead."""
        self._loader.close()
        if self._ahead is not None:
            self._ahead.close()

    def _wanted(self, clips: StepClips) -> list[Wanted]:
        return [
            (stream, utterance, clips.draw)
            for stream in clips.streams
            for utterance in self._shares(clips, stream)[self._rank]
        ]

    def _shares(self, clips: StepClips, stream: str) -> list[list[Utterance]]:
        """The utterances that each tensor-parallel rank encodes: dealt longest first, each once."""
        distinct = {utterance.id: utterance for utterance in clips.utterances}.values()
        ordered = sorted(distinct, key=lambda utterance: (-_rows(utterance, stream), utterance.id))
        return [ordered[rank :: self._size] for rank in range(self._size)]

    @torch.no_grad()
    def _encode(self, stream: str, utterances: Sequence[Utterance], clips: Sequence[Tensor]) -> dict[str, Tensor]:
        """Features of clips by utterance id, float16 [T, width]."""
        encoder, features = self._encoders[stream], dict[str, Tensor]()
        for first in range(0, len(clips), CLIPS_TOGETHER):
            together = slice(first, first + CLIPS_TOGETHER)
            if self._adaptation is not None:
                self._adaptation.keep(stream, [utterance.id for utterance in utterances[together]], clips[together])
            encoded = encoder([clip.to(self._device) for clip in clips[together]])
            rows = [_rows(utterance, stream) for utterance in utterances[together]]
            assert [len(each) for each in encoded] == rows, "an encoder's frames follow from the clip's length"
            ids = [utterance.id for utterance in utterances[together]]
            features |= dict(zip(ids, to_float16(encoded, ids, f"{stream} encoder"), strict=True))
        return features

    def _exchange(
        self, stream: str, shares: Sequence[Sequence[Utterance]], mine: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The features of all shares: every rank sends its own, padded to the longest share."""
        rows = [[_rows(utterance, stream) for utterance in share] for share in shares]
        longest = max(map(sum, rows))
        block = torch.zeros((longest, self._encoders[stream].width), dtype=torch.float16, device=self._device)
        if mine:  # there may be fewer clips than ranks
            block[: sum(rows[self._rank])] = torch.cat([mine[utterance.id] for utterance in shares[self._rank]])
        gathered = block.new_empty((self._size * longest, block.shape[1]))
        dist.all_gather_into_tensor(gathered, block, group=self._group)
        features: dict[str, Tensor] = {}
        for part, share, lengths in zip(gathered.split(longest), shares, rows, strict=True):
            features |= dict(zip((each.id for each in share), part[: sum(lengths)].split(lengths), strict=True))
        return features


def _rows(utterance: Utterance, stream: str) -> int:
    """Feature frames of a clip."""
    return audio_frames(utterance.samples) if stream == "audio" else utterance.frames
