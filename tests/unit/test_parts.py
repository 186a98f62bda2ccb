"""How global batches are cut into microbatches and dealt to ranks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from mome_dist.config import load_config
from mome_dist.config.derived import schedule_of, views_of
from mome_dist.data.corpus import Corpus
from mome_dist.data.order import order_of, shares_of
from mome_dist.data.parts import Parts, Work, work_of_sequence
from mome_dist.llm.tiny import save_llm, tiny_llama, word_tokenizer
from mome_dist.model.shared import build_sequences
from mome_dist.parallel.layout import Layout
from mome_dist.training.batches import BatchBuilder
from mome_dist.training.setup import work_of_first_steps

BATCH = [7, 3, 9, 1, 4, 8, 2, 6, 5, 0]
TOKENS = [30, 40, 50, 60, 70, 80, 90, 100, 110, 120]  # 750


def _flat(shares: list[list[list[int]]]) -> list[int]:
    return sorted(index for part in shares for hand in part for index in hand)


@pytest.mark.parametrize("dp_size", [1, 2, 5])
def test_a_fixed_number_of_parts_holds_every_utterance_once(dp_size: int) -> None:
    shares = Parts(2).shares(BATCH, TOKENS, TOKENS, dp_size)
    assert len(shares) == 2 and all(len(part) == dp_size for part in shares)
    assert _flat(shares) == sorted(BATCH)
    # A microbatch holds the same utterances at any number of ranks.
    alone = Parts(2).shares(BATCH, TOKENS, TOKENS, 1)
    assert [_flat([part]) for part in shares] == [_flat([part]) for part in alone]


@pytest.mark.parametrize(("budget", "dp_size", "parts"), [(10_000, 1, 1), (400, 1, 2), (200, 1, 5), (200, 2, 3)])
def test_a_budget_is_kept_with_as_few_parts_as_it_takes(budget: int, dp_size: int, parts: int) -> None:
    of = dict(zip(BATCH, TOKENS, strict=True))
    shares = Parts(1, budget).shares(BATCH, TOKENS, TOKENS, dp_size)
    assert len(shares) == parts and _flat(shares) == sorted(BATCH)

    def fullest(count: int) -> int:
        dealt = shares_of(BATCH, TOKENS, count, dp_size)
        return max(sum(of[index] for index in hand) for part in dealt for hand in part)

    assert fullest(parts) <= budget and all(fullest(fewer) > budget for fewer in range(1, parts))


def test_a_budget_below_one_utterance_ends_with_one_in_every_part() -> None:
    shares = Parts(1, 10).shares(BATCH, TOKENS, TOKENS, 2)
    assert len(shares) == 5 and all(len(hand) == 1 for part in shares for hand in part)


def test_parts_are_a_multiple_where_there_are_utterances_enough() -> None:
    assert len(Parts(3, 10_000, 3).shares(BATCH, TOKENS, TOKENS, 1)) == 3
    assert len(Parts(3, 200, 3).shares(BATCH, TOKENS, TOKENS, 1)) == 6
    assert len(Parts(3, 10, 3).shares(BATCH, TOKENS, TOKENS, 1)) == 9  # ten utterances are no multiple
    assert len(Parts(4).shares(BATCH[:3], TOKENS[:3], TOKENS[:3], 1)) == 3


def test_work_counts_attention() -> None:
    """A long sequence is more work than two halves of it, by what their tokens do not look at."""
    whole, halves = work_of_sequence(1000, 1e-3), 2 * work_of_sequence(500, 1e-3)
    assert whole == 100 * 2000 and halves == 100 * 1500
    assert work_of_sequence(10, 0.0) == 1000


def test_hands_of_equal_work_rather_than_of_equal_tokens() -> None:
    drawn = random.Random(0)
    tokens = [drawn.randint(20, 2000) for _ in range(64)]
    work = [work_of_sequence(each, 1e-2) for each in tokens]
    batch = list(range(64))
    uneven = {}
    for name, weights in (("work", work), ("tokens", tokens)):
        shares = Parts(1).shares(batch, tokens, weights, 4)
        frames = dict.fromkeys(batch, 1)
        uneven[name] = Work.of(shares, frames, dict(enumerate(tokens)), dict(enumerate(work))).imbalance
    assert 1 <= uneven["work"] < uneven["tokens"]


def test_the_line_on_an_epoch_says_what_ranks_wait_for() -> None:
    shares = [[[0, 1], [2]], [[3], [4]]]
    of = {0: 10, 1: 20, 2: 10, 3: 20, 4: 20}
    work = Work.of(shares, of, of, of)
    assert (work.work, work.fullest, work.utterances, work.microbatches) == (80, 2 * 30 + 2 * 20, 5, 2)
    assert work.imbalance == 1.25
    line = (work + work).describe(1234, 2)
    assert line == (
        "an epoch is 1,234 steps; in the mean 5.0 utterances, 80 video frames and 80 tokens a step, in 2.0 "
        "microbatches; the fullest rank has 25.0% more work than the mean"
    )
    assert "fullest" not in work.describe(1234, 1)


@pytest.mark.parametrize(("task", "batch_size", "steps"), [("omni", 4, 6), ("omni", 12, 4), ("all", 4, 6)])
def test_the_tokens_of_a_pass_are_those_of_the_views_that_its_steps_draw(
    tiny_corpus: Corpus, tmp_path: Path, task: str, batch_size: int, steps: int
) -> None:
    """Three views of eight at one pair of rates, or two of eight: what `mome.dispatch=auto` is settled by."""
    utterances = tiny_corpus.split("train")
    tokenizer = word_tokenizer(utterance.text for utterance in utterances)
    save_llm(tiny_llama(tokenizer, hidden=16, layers=1, ffn_width=16), tokenizer, tmp_path)
    config = load_config(["experiment=tiny", f"task={task}", f"llm.path={tmp_path}"])
    layout, schedule = Layout.for_world(1), schedule_of(config)
    builder = BatchBuilder(utterances, build_sequences(config), None, Parts(2), 0, 1, torch.device("cpu"), layout)
    order = order_of(utterances, batch_size, None, 1, seed=0)
    built = [builder.build(order.batch(step), schedule.of_step(step)).tokens for step in range(steps)]
    work = work_of_first_steps(order, builder, schedule)
    assert (work.steps, work.tokens) == (steps, sum(built)) and work.mean_tokens(1) == sum(built) // (2 * steps)
    assert work.tokens < steps * builder.build(order.batch(0), views_of(config)).tokens / 2
