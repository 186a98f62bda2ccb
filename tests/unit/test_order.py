"""The training order: complete epochs, reshuffled, independent of ranks, exact from any step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mome_dist.data.corpus import Utterance
from mome_dist.data.order import (
    BatchOrder,
    FrameOrder,
    Order,
    check_shares,
    cut_evenly,
    deal,
    order_of,
    share_of_rank,
    shares_of,
)
from mome_dist.data.parts import Work
from mome_dist.errors import UserError

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


def test_epochs_of_a_fixed_number_end_with_the_step_that_completes_them() -> None:
    order = replace(ORDER, batch_size=5, pool=1)
    assert [order.steps_of(epochs) for epochs in (1, 2, 5)] == [7, 13, 32]  # 32, 64 and 160 utterances
    assert min(Counter(_order(range(7), order)).values()) == 1 and set(_order(range(7), order)) == set(range(32))
    assert order.utterances_before(13) == 65 and order.smallest_batch(9)[1] == 5


def _frame_order(seed: int, pool: int = 4, utterances: int = 300, max_frames: int = 1500) -> FrameOrder:
    """Lengths as in speech corpora: most clips are short, a few long."""
    lengths = np.random.default_rng(1000 + seed).lognormal(4.3, 0.7, utterances).astype(int).clip(12, 600)
    return FrameOrder(lengths.tolist(), max_frames, pool, seed)


SEEDS = range(12)


@pytest.mark.parametrize("pool", [1, 4, 100])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_budget_of_frames_is_kept_and_every_epoch_is_whole_and_new(seed: int, pool: int) -> None:
    order = _frame_order(seed, pool)
    assert order.steps_of(0) == 0
    epochs = []
    for epoch in range(3):
        batches = [order.batch(step) for step in range(order.steps_of(epoch), order.steps_of(epoch + 1))]
        assert sorted(index for batch in batches for index in batch) == list(range(300))
        frames = [sum(order.lengths[index] for index in batch) for batch in batches]
        assert max(frames) <= 1500 and np.mean(frames) > 0.8 * 1500
        epochs.append({frozenset(batch) for batch in batches})
    for one, other in pairwise(epochs):  # two or three of the longest clips may meet again
        assert all(len(batch) <= 3 for batch in one & other) and len(one & other) < 0.1 * len(one)


def test_a_pool_makes_batches_of_similar_length_in_shuffled_order() -> None:
    def padding(order: FrameOrder) -> float:
        batches = [[order.lengths[i] for i in order.batch(step)] for step in range(order.steps_of(1))]
        return 1 - sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)

    sorted_together, unsorted = _frame_order(0, 100, utterances=1500), _frame_order(0, 1, utterances=1500)
    assert padding(sorted_together) < 0.05 < 0.4 < padding(unsorted)
    order = _frame_order(0, pool=100)
    longest = [max(order.lengths[i] for i in order.batch(step)) for step in range(order.steps_of(1))]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_any_step_of_the_budget_order_can_be_asked_first(seed: int) -> None:
    order, last = _frame_order(seed), _frame_order(seed).steps_of(3)
    whole = [order.batch(step) for step in range(last)]
    for step in np.random.default_rng(seed).permutation(last)[:20].tolist():
        anew = _frame_order(seed)  # a resumed run
        assert anew.batch(step) == whole[step]
        assert anew.utterances_before(step) == sum(map(len, whole[:step]))
    assert _frame_order(seed + 1).batch(0) != whole[0]
    step, fewest = order.smallest_batch(last)
    assert len(whole[step]) == fewest == min(map(len, whole))


@pytest.mark.parametrize("seed", SEEDS)
def test_runs_are_even_and_hardly_more_than_the_budget_needs(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 60, 400)
    cuts = cut_evenly(lengths, 500)
    assert [first for first, _ in cuts] == [0, *(last for _, last in cuts[:-1])] and cuts[-1][1] == 400
    totals = [int(lengths[first:last].sum()) for first, last in cuts]
    assert max(totals) <= 500
    # A run misses its share of what is left by less than a clip (59). The runs that are left make up for it, so that
    # the share drifts by 59 over their number: at most by 59 (1 + 1/2 + ... ), the own miss apart.
    drift = 59 * (1 + sum(1 / left for left in range(1, len(cuts))))
    assert max(abs(total - np.mean(totals)) for total in totals) <= drift + 1  # shares are rounded
    fewest, room = 0, 0
    for length in lengths.tolist():  # filling every run to the brim
        fewest, room = (fewest, room - length) if length <= room else (fewest + 1, 500 - length)
    assert fewest <= len(cuts) <= fewest + 1


def test_clips_of_the_whole_budget_are_batches_of_their_own() -> None:
    assert cut_evenly([5, 5, 5], 5) == [(0, 1), (1, 2), (2, 3)]
    assert cut_evenly([1, 1, 9, 1, 1], 9) == [(0, 2), (2, 3), (3, 5)]
    assert cut_evenly([3], 5) == [(0, 1)]


@pytest.mark.parametrize("hands", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", SEEDS)
def test_dealing_is_even(seed: int, hands: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 400, int(rng.integers(hands, 80))).tolist()
    dealt = deal(lengths, hands)
    assert sorted(position for hand in dealt for position in hand) == list(range(len(lengths)))
    counts = [len(hand) for hand in dealt]
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1
    # In a round the hands' totals t_1 <= t_2 <= ... get clips a_1 >= a_2 >= ..., so two hands then differ by
    # (a_i - a_j) - (t_j - t_i), a difference of two numbers >= 0: no more than the larger of the round's spread and
    # the difference before it.
    ordered = sorted(lengths, reverse=True)
    padded = ordered + [0] * (-len(ordered) % hands)
    spread = max(padded[start] - padded[start + hands - 1] for start in range(0, len(padded), hands))
    totals = [sum(lengths[position] for position in hand) for hand in dealt]
    assert max(totals) - min(totals) <= spread


@pytest.mark.parametrize("seed", SEEDS)
def test_the_global_batch_and_its_chunks_are_the_same_at_any_number_of_ranks(seed: int) -> None:
    order = _frame_order(seed, max_frames=6000)
    for step in range(order.steps_of(1)):
        batch = order.batch(step)
        lengths = [order.lengths[index] for index in batch]
        chunks = [set(chunk) for chunk in share_of_rank(batch, lengths, 2, 0, 1)]
        for size in (2, 3, 4):
            shares = [share_of_rank(batch, lengths, 2, rank, size) for rank in range(size)]
            assert [set().union(*(share[chunk] for share in shares)) for chunk in (0, 1)] == chunks
            assert sum(len(part) for share in shares for part in share) == len(batch)
            assert all(part for share in shares for part in share)


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_have_nearly_equal_work(seed: int) -> None:
    order, size = _frame_order(seed, pool=16, utterances=1500, max_frames=6000), 4
    for step in range(order.steps_of(1)):
        batch = order.batch(step)
        work = _work(order, batch, size)
        # By the bound on dealing, the fullest rank is above the mean by no more than the largest spread of a round,
        # and rounds of clips in order of length together span no more than the longest clip.
        longest = max(order.lengths[index] for index in batch)
        assert 1 <= work.imbalance <= 1 + longest * size / work.work
    total = sum(_work(order, order.batch(s), size).fullest for s in range(order.steps_of(1)))
    strided = sum(
        size * max(sum(order.lengths[i] for i in order.batch(s)[rank::size]) for rank in range(size))
        for s in range(order.steps_of(1))
    )
    assert total / sum(order.lengths) < 1.06 and total < strided, "better than every fourth clip of the batch"


def _work(order: Order, batch: list[int], size: int) -> Work:
    """The work of a step whose utterances are as much work as they are long."""
    lengths = {index: order.lengths[index] for index in batch}
    return Work.of(shares_of(batch, list(lengths.values()), 1, size), lengths, lengths, lengths)


def _utterances(lengths: list[int]) -> list[Utterance]:
    return [Utterance(f"u{number}", "", "", "", 640 * length, 0, {}) for number, length in enumerate(lengths)]


def test_what_the_budget_has_no_room_for_is_named() -> None:
    with pytest.raises(UserError, match=r"has no room for u2 \(200\), u1 \(101\), in video frames: .* at least 200"):
        order_of(_utterances([100, 101, 200]), None, 100, 4, 0)
    with pytest.raises(UserError, match=r"u9 \(19\), .*, u5 \(15\) and 5 more"):
        order_of(_utterances(list(range(10, 20))), None, 9, 4, 0)
    order = order_of(_utterances([100, 101, 200]), None, 200, 4, 0)
    assert isinstance(order, FrameOrder) and order.lengths == [100, 101, 200]


def test_a_step_that_leaves_a_rank_without_work_is_refused() -> None:
    orders: list[Order] = [FrameOrder([50] * 32, 200, 4, 0), replace(ORDER, pool=1)]  # four utterances a batch
    for order in orders:
        check_shares(order, 20, accumulation=2, dp_size=2)
    order = FrameOrder([50] * 32 + [200], 200, 4, 0)
    step = next(step for step in range(order.steps_of(1)) if order.batch(step) == [32])
    check_shares(order, order.steps_of(1), accumulation=1, dp_size=1)
    with pytest.raises(UserError, match=rf"step {step + 1} would have 1 utterances, but 2 = .* raise data.max_frames"):
        check_shares(order, 1, accumulation=1, dp_size=2)


def test_ranks_share_every_chunk_whatever_their_number() -> None:
    batch = list(range(100, 124))
    for size in (1, 2, 4):
        shares = [share_of_rank(batch, batch, 3, rank, size) for rank in range(size)]
        for chunk in range(3):
            together = sorted(index for share in shares for index in share[chunk])
            assert together == sorted(share_of_rank(batch, batch, 3, 0, 1)[chunk]) and len(together) == 8
        for share in shares:
            assert {len(part) for part in share} == {8 // size}
