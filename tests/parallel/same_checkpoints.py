"""Checkpoints of both formats compared, and engines that go on from what is written for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mome_dist.checkpoint.deepspeed.read import allowed_classes
from mome_dist.checkpoint.format import CONFIG, CheckpointReader
from mome_dist.checkpoint.reshard import reshard
from mome_dist.parallel.layout import Layout
from mome_dist.verification.probe import Probe
from tests.parallel.resharding import STEPS, TAG, load_and_train, tree_differences
from tests.parallel.worlds import run_world

Place = tuple[Layout, int]
"""A layout and a ZeRO stage."""


def facts_and_tensors(checkpoint: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a layout-free checkpoint holds: what its index says whatever the files, and every tensor."""
    with CheckpointReader(checkpoint) as reader:
        reader.verify()
        cut = ("files", "tensors", "resharded")
        tensors = {name: reader.read(name) for name in reader.names()}
        return {key: value for key, value in reader.index.items() if key not in cut}, tensors


def assert_same_checkpoint(one: Path, other: Path) -> None:
    (facts, tensors), (other_facts, other_tensors) = facts_and_tensors(one), facts_and_tensors(other)
    assert facts == other_facts
    assert tensors.keys() == other_tensors.keys()
    assert not [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])]
    assert (one / CONFIG).read_bytes() == (other / CONFIG).read_bytes()


def load_all(folder: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(allowed_classes()):
        return {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def assert_same_files(mine: Path, theirs: Path) -> None:
    """Compare two directories of a tag, all files and all that is in them."""
    one, other = load_all(mine), load_all(theirs)
    assert one.keys() == other.keys()
    found = [difference for name in one for difference in tree_differences(one[name], other[name], name)]
    assert not found, found


def assert_engines_go_on(
    probe: Probe,
    canonical: Path,
    folder: Path,
    source: Place,
    targets: Mapping[str, Place],
    losses: Sequence[float],
) -> None:
    """Engines at other layouts load a checkpoint, hold the same numbers, save the same files and train on as the source
    did; written back for the source, it is what it was.

    Args:
        canonical: the checkpoint.
        folder: for what is written.
        source: where it was trained.
        targets: by name.
        losses: of the two steps that the source trained after it.
    """
    for name, (layout, zero) in targets.items():
        native, scratch = folder / f"{name} native", folder / f"{name} scratch"
        scratch.mkdir()
        reshard(canonical, native, "deepspeed", layout, zero)
        for rank in run_world(load_and_train, layout.world_size, probe, layout, zero, native, canonical, scratch):
            assert rank.different == [] and rank.losses == pytest.approx(losses, rel=1e-6)
        assert_same_files(native / f"global_step{STEPS}", scratch / "native" / TAG)
        reshard(native, folder / f"{name} back", "canonical", *source)
        assert_same_checkpoint(canonical, folder / f"{name} back")
