"""What an utterance gives depends on nothing but itself: not on its neighbours, not on the layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mome_dist.model.build import build_distributed
from mome_dist.model.distributed import MicroBatch
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.token_context import Modality
from mome_dist.verification.probe import FIRST_WORD, Probe, wake
from mome_dist.verification.verify import Verifier
from tests.parallel.worlds import run_world

TOKENS = 512  # of a pass, so that neighbours of other lengths leave the number of rows as it is


def _with_other_content(batch: MicroBatch, seed: int) -> MicroBatch:
    """Other features and words in all clips but the first, of the same lengths."""
    generator = torch.Generator().manual_seed(seed)
    context, ids_N = batch.tokens.context, batch.tokens.ids_N.clone()
    words_N = (context.modality_N == Modality.TEXT) & (ids_N >= FIRST_WORD) & ~_of_first_clip(batch)
    assert words_N.any()
    ids_N[words_N] = torch.randint(FIRST_WORD, 64, (int(words_N.sum()),), generator=generator)
    features = {
        stream: [clips[0], *(torch.randn(clip.shape, generator=generator) for clip in clips[1:])]
        for stream, clips in batch.features.items()
    }
    return MicroBatch(replace(batch.tokens, ids_N=ids_N), features)


def _of_first_clip(batch: MicroBatch) -> torch.Tensor:
    """Bool [N], the tokens of the first clip in every view."""
    context, own_N, start = batch.tokens.context, torch.zeros(batch.tokens.context.tokens, dtype=torch.bool), 0
    for place, length in enumerate(context.lengths):
        own_N[start : start + length] = place % context.view_sequences[0] == 0
        start += length
    return own_N


def _logits(probe: Probe, layout: Layout, dispatch: str, neighbours: list[int], seeds: list[int]) -> list[np.ndarray]:
    """Logits [S, V] of utterance 0 in all views when others share its batch, by the seed of their content; every rank
    has other neighbours."""
    with parallel_world(layout, probe.config.seed, timeout_seconds=60) as at:
        model = build_distributed(probe.config, layout, probe.widths, dispatch, torch.device("cpu")).eval()
        wake(model.trained_parts(), probe.config.seed)
        whole = probe.microbatch([0, *(number + 50 * at.dp for number in neighbours)], least=TOKENS)
        assert whole.tokens.context.tokens == TOKENS
        chunk: Any = model.chunks[0]
        found = []
        with torch.no_grad():
            for seed in seeds:
                batch = _with_other_content(whole, seed + at.dp)
                logits_NV = chunk.llm.logits(chunk.embed(batch), batch.tokens.context)
                found.append(logits_NV[_of_first_clip(batch)].numpy())
        return found


@pytest.mark.parametrize("dispatch", ["alltoall", "gather"])
def test_neighbours_change_no_bit_and_layouts_change_nothing(verifier: Verifier, dispatch: str) -> None:
    alone = run_world(_logits, 1, verifier.probe, Layout.for_world(1), dispatch, [1, 2, 3], [0])[0][0]
    for ep in (1, 2, 4):
        layout = Layout.for_world(ep, ep=ep)
        first, second = run_world(_logits, ep, verifier.probe, layout, dispatch, [1, 2, 3], [0, 100])[0]
        assert np.array_equal(first, second), np.abs(first - second).max()
        np.testing.assert_allclose(first, alone, rtol=0, atol=1e-5)
        # Neighbours of other lengths move an utterance to other rows, and its attention into a batch of another width.
        longer = run_world(_logits, ep, verifier.probe, layout, dispatch, [7, 8, 9], [0])[0][0]
        np.testing.assert_allclose(longer, alone, rtol=0, atol=1e-5)


def test_utterances_differ(verifier: Verifier) -> None:
    """The probe of the test above can tell utterances and contents apart."""
    first, second = (verifier.probe.example(number, verifier.probe.views[0]).ids for number in (0, 1))
    assert first != second
    batch = verifier.probe.microbatch([0, 1])
    one, other = (_with_other_content(batch, seed) for seed in (0, 100))
    assert not torch.equal(one.tokens.ids_N, other.tokens.ids_N)
    for stream, (own, neighbour) in one.features.items():
        assert torch.equal(own, other.features[stream][0]) and not torch.equal(neighbour, other.features[stream][1])
