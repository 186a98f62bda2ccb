"""Worlds of spawned processes, which checks on GPUs need."""

from __future__ import annotations

import os

import pytest

from mome_dist.parallel.forked import run_spawned


def test_spawned_ranks_know_their_place_and_return_in_order() -> None:
    assert run_spawned(os.getenv, 3, "RANK") == ["0", "1", "2"]
    assert run_spawned(os.getenv, 2, "WORLD_SIZE") == ["2", "2"]


def test_a_spawned_rank_that_fails_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"rank 0 of 1 failed:[\s\S]*invalid literal"):
        run_spawned(int, 1, "no number")
