"""Batches by video frames: ranks hold unequal numbers of utterances, and still every layout trains alike."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mome_dist.checkpoint.format import CheckpointReader, find_checkpoint
from mome_dist.data.corpus import Corpus
from tests.parallel.runs import Lab, lines

FRAMES = 780  # about twelve of the corpus's clips
SETTINGS = (
    "data.batch_size=null",
    f"data.max_frames={FRAMES}",
    "data.bucket_batches=4",
    "data.accumulation=2",
    "training.log_utterances=true",
    "training.epochs=2",
    "task.views_per_step=2",
)


@pytest.fixture(scope="module")
def one_process(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """Losses of two epochs, and the run's directory with a checkpoint after three steps."""
    output = tmp_path_factory.mktemp("one")
    return lab.train(1, output, *SETTINGS, "training.save_every=3", "training.keep_checkpoints=9"), output


def _trained(run: Path) -> list[list[str]]:
    """Utterances of every step."""
    return [record["utterances"] for record in lines(run / "metrics.jsonl")]


def test_two_epochs_hold_every_utterance_twice_in_new_batches(
    lab: Lab, one_process: tuple[list[float], Path], tiny_corpus_dir: Path
) -> None:
    length = {utterance.id: utterance.length for utterance in Corpus.open(tiny_corpus_dir).split("train")}
    steps = _trained(one_process[1])
    assert Counter(name for step in steps for name in step) == dict.fromkeys(length, 2)
    assert (
        len({len(step) for step in steps}) > 1 and max(sum(map(length.__getitem__, step)) for step in steps) <= FRAMES
    )
    assert len({frozenset(step) for step in steps}) == len(steps)
    with CheckpointReader(find_checkpoint(one_process[1])) as reader:
        data = reader.index["data"]
    assert reader.step == len(steps) and data["utterances_seen"] == 2 * len(length)
    assert data["order"]["data.max_frames"] == FRAMES and data["order"]["data.batch_size"] is None


@pytest.mark.parametrize(
    ("world", "tp", "pp", "ep", "more"),
    [
        (2, 1, 1, 1, ("deepspeed=zero2",)),
        (2, 1, 1, 2, ()),
        (4, 2, 2, 1, ()),
        (4, 1, 2, 1, ("parallel.virtual=2",)),
    ],
    ids=["dp2", "ep2", "tp2-pp2", "pp2-virtual2-dp2"],
)
def test_losses_equal_one_process(
    lab: Lab,
    one_process: tuple[list[float], Path],
    tmp_path: Path,
    world: int,
    tp: int,
    pp: int,
    ep: int,
    more: tuple[str, ...],
) -> None:
    losses = lab.train(world, tmp_path, *SETTINGS, *more, tp=tp, pp=pp, ep=ep)
    np.testing.assert_allclose(losses, one_process[0], rtol=1e-5)
    assert _trained(tmp_path) == _trained(one_process[1]) and losses[-1] < losses[0]


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (3, 1)])
def test_a_run_goes_on_at_other_ranks_with_the_same_batches(
    lab: Lab, one_process: tuple[list[float], Path], tmp_path: Path, world: int, ep: int
) -> None:
    losses, whole = one_process
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for checkpoint in (broken / "checkpoints").glob("step-*"):
        if checkpoint.name != "step-000003":
            shutil.rmtree(checkpoint)
    (broken / "checkpoints/latest").write_text("step-000003")
    rest = lab.train(world, broken, *SETTINGS, ep=ep)
    np.testing.assert_allclose(rest, losses[3:], rtol=1e-5)
    assert _trained(broken) == _trained(whole)


def test_another_budget_is_refused(lab: Lab, one_process: tuple[list[float], Path], tmp_path: Path) -> None:
    shutil.copytree(one_process[1], tmp_path / "run")
    with pytest.raises(RuntimeError, match=rf"was trained with data\.max_frames={FRAMES}, now it is 500"):
        lab.train(1, tmp_path / "run", *SETTINGS, "data.max_frames=500", "training.epochs=3")


def test_a_budget_of_tokens_cuts_the_same_global_batch_at_any_number_of_ranks(lab: Lab, tmp_path: Path) -> None:
    """One token is room for one utterance a microbatch: eight microbatches on one rank, four on each of two. Without a
    balance loss, which is that of a microbatch, all are the same run."""
    settings = ("mome.balance_loss=0", "training.steps=3", "data.batch_size=8")
    fixed = lab.train(1, tmp_path / "fixed", *settings, "data.accumulation=8")
    assert lab.train(1, tmp_path / "one", *settings, "data.microbatch_tokens=1") == fixed
    np.testing.assert_allclose(lab.train(2, tmp_path / "two", *settings, "data.microbatch_tokens=1"), fixed, rtol=1e-5)
    np.testing.assert_allclose(lab.train(1, tmp_path / "whole", *settings), fixed, rtol=1e-5)
