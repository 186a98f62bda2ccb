"""In evaluation, what an utterance gives depends on nothing but itself: not on its neighbours, not on the layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mome_dist.parallel.build import build_distributed
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.speech.sequence import collate
from mome_dist.verification.probe import Probe, wake
from mome_dist.verification.verify import Verifier
from tests.parallel.worlds import run_world

LENGTH = 40


def _logits(probe: Probe, layout: Layout, dispatch: str, neighbours: list[int]) -> np.ndarray:
    """Logits [S, V] of utterance 0 when others share its batch; every rank has other neighbours."""
    with parallel_world(layout, probe.config.seed, timeout_seconds=60) as at:
        model = build_distributed(probe.config, layout, probe.widths, dispatch, torch.device("cpu")).eval()
        experts = [(p.name, p.index, p.value) for p in model.trained_parts() if ".routed." in p.name]
        wake(experts, probe.config.seed)
        view = probe.views[0]
        batch = probe.microbatch([0, *(number + 50 * at.dp for number in neighbours)], view, LENGTH)
        chunk: Any = model.chunks[0]
        with torch.no_grad():
            return chunk.llm.logits(chunk.embed(batch), batch.tokens.padding_BS)[:, 0].numpy()


@pytest.mark.parametrize("dispatch", ["alltoall", "gather"])
def test_neighbours_change_no_bit_and_layouts_change_nothing(verifier: Verifier, dispatch: str) -> None:
    alone = run_world(_logits, 1, verifier.probe, Layout.for_world(1), dispatch, [1, 2, 3])[0]
    for ep in (1, 2, 4):
        layout = Layout.for_world(ep, ep=ep)
        first = run_world(_logits, ep, verifier.probe, layout, dispatch, [1, 2, 3])[0]
        second = run_world(_logits, ep, verifier.probe, layout, dispatch, [7, 8, 9])[0]
        assert np.array_equal(first, second), np.abs(first - second).max()
        np.testing.assert_allclose(first, alone, rtol=0, atol=1e-5)


def test_utterances_differ(verifier: Verifier) -> None:
    """The probe of the test above can tell utterances apart."""
    first, second = (
        collate([verifier.probe.example(number, verifier.probe.views[0])], LENGTH).ids_BS for number in (0, 1)
    )
    assert not torch.equal(first, second)
