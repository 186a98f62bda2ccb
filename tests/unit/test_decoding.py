"""Decoding: what a clip says does not depend on its batch, its place or the number of beams' bookkeeping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mome_dist.checkpoint.load import LoadedRun, load_run
from mome_dist.config.schema import DecodingConfig
from mome_dist.errors import UserError
from mome_dist.evaluation.decoding import batches_by_length, check_view, decode, decode_batch
from mome_dist.speech.projector import Projectors
from mome_dist.speech.views import View
from tests.evaluation_run import WIDTHS, make_run

LENGTHS = [30, 55, 26, 90, 41, 27, 64]
VIEWS = [View("asr", 4, None), View("vsr", None, 5), View("avsr", 4, 5)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_corpus_dir: Path) -> LoadedRun:
    return load_run(make_run(tmp_path_factory.mktemp("decoding"), tiny_corpus_dir))


@pytest.fixture(scope="module")
def clips() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    audio = [2 * torch.randn(frames, WIDTHS["audio"], generator=generator) for frames in LENGTHS]
    video = [2 * torch.randn(frames // 2, WIDTHS["video"], generator=generator) for frames in LENGTHS]
    return audio, video


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_batched_equals_single(
    run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]], view: View, beams: int
) -> None:
    audio, video = clips
    config = DecodingConfig(beams, 8)
    together = decode_batch(run.model, run.sequences, view, audio, video, config)
    alone = [
        decode_batch(run.model, run.sequences, view, [a], [v], config)[0] for a, v in zip(audio, video, strict=True)
    ]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) > 1, "every clip decodes alike: the test cannot tell them apart"


def test_results_are_in_input_order_at_any_batch_size(run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]]) -> None:
    audio, _ = clips
    texts = [
        decode(run.model, run.sequences, VIEWS[0], audio, [], DecodingConfig(1, 6, batch_size))
        for batch_size in (1, 2, 16)
    ]
    assert texts[0] == texts[1] == texts[2]
    backwards = decode(run.model, run.sequences, VIEWS[0], audio[::-1], [], DecodingConfig(1, 6, 2))
    assert backwards[::-1] == texts[0]
    assert decode(run.model, run.sequences, VIEWS[0], [], [], DecodingConfig()) == []


def test_a_rate_that_was_never_trained_decodes(run: LoadedRun, clips: tuple[list[Tensor], list[Tensor]]) -> None:
    unseen = View("avsr", 10, 3)
    assert unseen not in run.views
    assert len(decode(run.model, run.sequences, unseen, *clips, DecodingConfig(1, 4, 16))) == len(LENGTHS)


def test_views_that_a_model_cannot_read_are_named() -> None:
    per_rate = Projectors({"audio": 4}, {"audio": [4, 16]}, 8, 6, per_rate=True, compression="stack")
    check_view(per_rate, View("asr", 16, None))
    with pytest.raises(UserError, match=r"asr\(8\).*rate 8.*4, 16"):
        check_view(per_rate, View("asr", 8, None))
    with pytest.raises(UserError, match=r"vsr\(2\) needs video"):
        check_view(per_rate, View("vsr", None, 2))


def test_batches_hold_similar_lengths_longest_first() -> None:
    batches = batches_by_length(LENGTHS, 3)
    assert batches == [[3, 6, 1], [4, 0, 5], [2]]
    assert batches_by_length([], 3) == []
    with pytest.raises(UserError, match="batch_size=0"):
        batches_by_length(LENGTHS, 0)
