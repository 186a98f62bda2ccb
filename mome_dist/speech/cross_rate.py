"""Which views of a step teach which, and which tokens of theirs say the same.

Every clip of a microbatch is there in all views of the step, so a coarse view can learn from a fine one without another
pass (`task.cross_rate`). A view learns from one view of its task: of those that are no coarser in any stream and finer
in one, the finest. Text tokens align one to one. Speech tokens align by the frames that they cover: a token of 16 audio
frames with the four of 4 that cover the same ones, the last of which may be missing; where the fine rate does not
divide the coarse one, a fine token that covers the edge of a coarse one counts for the frames that both have. A token
of a stream that the clip goes without, in either view, learns nothing.

Shape suffixes: M coarse speech tokens of a microbatch; W fine tokens that share frames with one of them, at most; Q
pairs of views.
Source: this project's own; Matryoshka training as in MoME (arXiv 2510.04136) trains its rates without such a term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from mome_dist.aligned_tokens import Aligned, ViewPair
from mome_dist.speech.sequence import AUDIO, VIDEO, Absent, Example
from mome_dist.speech.views import View, coarser_streams

PLACEHOLDERS = {"audio": AUDIO, "video": VIDEO}


def view_pairs(views: Sequence[View]) -> tuple[ViewPair, ...]:
    """The pairs of a step's views, in the order of those that learn; the finest view of a task learns from none."""
    found = []
    for place, view in enumerate(views):
        finer = [other for other, teacher in enumerate(views) if coarser_streams(teacher, view)]
        if finer:
            finest = min(finer, key=lambda other: (views[other].audio_rate or 0, views[other].video_rate or 0))
            found.append(ViewPair(finest, place))
    return tuple(found)


@lru_cache(maxsize=4096)
def overlaps(fine: int, coarse: int, fine_rate: int, coarse_rate: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which fine tokens of a clip's stream share frames with its coarse ones.

    Args:
        fine, coarse: tokens at the two rates.

    Returns:
        int64 [coarse, W], fine tokens from zero, and fp32 of the same shape, their shares of the frames that they and
        the coarse token have, which add up to one; tokens without any have a share of zero. Not to be changed.
    """
    first_C1 = (np.arange(coarse) * coarse_rate)[:, None]
    token_CW = first_C1 // fine_rate + np.arange(-(-coarse_rate // fine_rate) + 1)
    last_CW = np.minimum((token_CW + 1) * fine_rate, first_C1 + coarse_rate)
    frames_CW = np.clip(last_CW - np.maximum(token_CW * fine_rate, first_C1), 0, None) * (token_CW < fine)
    shares_CW = frames_CW / frames_CW.sum(axis=1, keepdims=True)
    return np.minimum(token_CW, fine - 1), shares_CW.astype(np.float32)


def align(
    sequences: Sequence[tuple[View, Sequence[Example]]],
    pairs: Sequence[ViewPair],
    tokens: Mapping[ViewPair, int],
    absent: Absent | None = None,
) -> Aligned:
    """Align the sequences of a pass, which has the same clips in every view, on the CPU.

    Args:
        sequences: as `mome_dist.speech.sequence.pack` gets them.
        pairs: of the step, at least one.
        tokens: of the global batch, see `coarse_tokens`.
        absent: which clips go without a stream; None if none does.
    """
    lengths = [len(example.ids) - 1 for _, examples in sequences for example in examples]
    starts, clips = [0, *accumulate(lengths)], len(sequences[0][1])
    rows: list[NDArray[np.int64]] = []
    fine: list[NDArray[np.int64]] = []
    shares: list[NDArray[np.float32]] = []
    weights: list[NDArray[np.float32]] = []
    for number, pair in enumerate(pairs):
        views = [sequences[place][0] for place in pair]
        for stream, rates in coarser_streams(*views).items():
            for clip in range(clips):
                (first_f, count_f), (first_c, count_c) = (
                    _speech(sequences[place][1][clip], stream, starts[place * clips + clip]) for place in pair
                )
                token_CW, share_CW = overlaps(count_f, count_c, *rates)
                learns = absent is None or not any(absent(view, clip, stream) for view in views)
                weight_QC = np.zeros((len(pairs), count_c), np.float32)
                weight_QC[number] = learns / tokens[pair]
                rows.append(first_c + np.arange(count_c))
                fine.append(first_f + token_CW)
                shares.append(share_CW)
                weights.append(weight_QC)
    width = max(each.shape[1] for each in shares)
    padded = [
        np.concatenate([np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in parts])
        for parts in (fine, shares)
    ]
    arrays = (np.concatenate(rows), *padded, np.concatenate(weights, axis=1))
    return Aligned(tuple(pairs), *map(torch.from_numpy, arrays))


def _speech(example: Example, stream: str, start: int) -> tuple[int, int]:
    """The first token of a stream in a sequence that starts somewhere, and how many there are."""
    mark = PLACEHOLDERS[stream]
    return start + example.ids.index(mark), example.ids.count(mark)


def coarse_tokens(
    views: Sequence[View], pairs: Sequence[ViewPair], tokens: Sequence[Mapping[str, int]]
) -> dict[ViewPair, int]:
    """How many coarse speech tokens each pair has.

    Args:
        tokens: of every view, by stream.
    """
    return {
        pair: sum(tokens[pair.coarse][stream] for stream in coarser_streams(views[pair.fine], views[pair.coarse]))
        for pair in pairs
    }
