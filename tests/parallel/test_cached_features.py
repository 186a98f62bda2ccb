"""Features that a command cached are those that training makes itself, bit for bit, whatever encoded them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mome_dist.commands.features import main
from mome_dist.data.features import FeatureStore
from tests.parallel.runs import Lab
from tests.parallel.worlds import run_world


def test_training_from_the_cache_has_the_same_losses(tiny_corpus_dir: Path, tmp_path: Path) -> None:
    lab, shared = Lab.make(tiny_corpus_dir, tmp_path / "lab"), tmp_path / "shared"
    short = ("training.steps=2", "task.tasks=[avsr]")
    itself = lab.train(1, tmp_path / "itself", *short)
    arguments = [*lab.overrides(tmp_path / "unused"), "--output", str(shared)]
    assert run_world(main, 2, arguments) == [0, 0]
    empty = replace(lab, cache=tmp_path / "empty cache")
    assert empty.train(1, tmp_path / "cached", f"data.features_dir={shared}", *short) == itself
    assert not (empty.cache / "features").exists(), "training encoded nothing"
    stores = sorted(path.parent for path in shared.rglob("part-*.safetensors"))
    assert sorted({store.name for store in stores}) == ["train", "validation"]
    for directory in set(stores):
        ours, theirs = FeatureStore(directory), FeatureStore(lab.cache / "features" / directory.relative_to(shared))
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(ours.get(name), theirs.get(name)) for name in ours._parts)
