"""The training order: complete epochs, reshuffled, independent of ranks, exact from any step."""

from __future__ import annotations

from mome_dist.data.order import batch_of_step, share_of_rank


def _positions(steps: range, batch: int = 6, utterances: int = 15) -> list[int]:
    return [index for step in steps for index in batch_of_step(utterances, batch, step, seed=4)]


def test_every_epoch_holds_every_utterance_once_in_another_order() -> None:
    order = _positions(range(10))  # four epochs of 15
    epochs = [order[start : start + 15] for start in range(0, 60, 15)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_a_function_of_the_step() -> None:
    assert _positions(range(7, 10)) == _positions(range(10))[7 * 6 :]
    assert batch_of_step(15, 6, 0, seed=4) != batch_of_step(15, 6, 0, seed=5)


def test_ranks_share_every_chunk_whatever_their_number() -> None:
    batch = list(range(100, 124))
    for size in (1, 2, 4):
        shares = [share_of_rank(batch, 3, rank, size) for rank in range(size)]
        for chunk in range(3):
            together = sorted(index for share in shares for index in share[chunk])
            assert together == batch[chunk * 8 : (chunk + 1) * 8]
