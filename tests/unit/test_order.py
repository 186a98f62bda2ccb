"""The training order: complete epochs, reshuffled, independent of ranks, exact from any step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from mome_dist.data.order import BatchOrder, share_of_rank

POOL = 16
LENGTHS = [100 + 7 * (index * 37 % 32) for index in range(32)]
ORDER = BatchOrder(LENGTHS, batch_size=4, pool=POOL, seed=4)


def _order(steps: range, order: BatchOrder = ORDER) -> list[int]:
    return [index for step in steps for index in order.batch(step)]


def test_every_utterance_is_seen_equally_often_in_a_new_order() -> None:
    order = _order(range(2 * POOL))  # two pools of two epochs each
    assert set(Counter(order).values()) == {4}
    assert order[: len(order) // 2] != order[len(order) // 2 :]


def test_batches_hold_utterances_of_similar_length() -> None:
    spread = [np.ptp([LENGTHS[i] for i in ORDER.batch(step)]) for step in range(POOL)]
    assert np.mean(spread) < 0.25 * np.ptp(LENGTHS)
    firsts = [LENGTHS[ORDER.batch(step)[0]] for step in range(POOL)]
    assert firsts != sorted(firsts)  # but the batches themselves come shuffled


def test_the_order_is_a_function_of_the_step() -> None:
    assert _order(range(37, 60)) == _order(range(60))[37 * 4 :]
    assert _order(range(8)) != _order(range(8), replace(ORDER, seed=5))


def test_without_a_pool_an_epoch_is_one_permutation() -> None:
    order = replace(ORDER, pool=1)
    assert sorted(_order(range(8), order)) == list(range(32))
    assert np.mean([np.ptp([LENGTHS[i] for i in order.batch(step)]) for step in range(8)]) > 0.4 * np.ptp(LENGTHS)


def test_ranks_share_every_chunk_whatever_their_number() -> None:
    batch = list(range(100, 124))
    for size in (1, 2, 4):
        shares = [share_of_rank(batch, 3, rank, size) for rank in range(size)]
        for chunk in range(3):
            together = sorted(index for share in shares for index in share[chunk])
            assert together == batch[chunk * 8 : (chunk + 1) * 8]
