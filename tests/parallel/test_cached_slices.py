"""Slices of the LLM from the cache are those from its own files, bit for bit, on every rank of a world."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mome_dist.llm.megatron import build_frozen_llm
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.slice_cache import SLICES, SliceCache
from mome_dist.llm.weights import load_weights
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from tests import tiny_llms
from tests.parallel.runs import Lab
from tests.parallel.worlds import run_world

# Three key-value groups for two ranks: a padded group is cached too. bf16 from fp32 files: a conversion is.
SIZES = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
Loaded = tuple[dict[str, np.ndarray], list[str]]


def _load(directory: Path, cache_root: Path | None, tp: int, pp: int, dp: int) -> Loaded:
    """Bits of this rank's parameters, and what the cache said."""
    said: list[str] = []
    layout = Layout.for_world(tp * pp * dp, tp=tp, pp=pp)
    with parallel_world(layout, 0, timeout_seconds=60):
        shape = LLMShape.from_directory(directory)
        llm = build_frozen_llm(shape, torch.bfloat16, "eager", torch.device("cpu"), layout)
        cache = None if cache_root is None else SliceCache(cache_root, "the source", said.append)
        load_weights(llm, shape, directory, cache)
        return {name: tensor.view(torch.int16).numpy() for name, tensor in llm.named_parameters()}, said


def _equal(found: list[Loaded], expected: list[Loaded]) -> bool:
    return all(
        rank.keys() == other.keys() and all(np.array_equal(rank[name], other[name]) for name in rank)
        for (rank, _), (other, _) in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 1, 2), (2, 2, 1)])
def test_cached_slices_equal_those_of_the_source(tmp_path: Path, tp: int, pp: int, dp: int) -> None:
    source = tiny_llms.save(tiny_llms.qwen2(**SIZES), tmp_path / "llm", shard_size="20KB")
    world, layout = tp * pp * dp, (tp, pp, dp)
    cache = tmp_path / "sliced"
    expected = run_world(_load, world, source, None, *layout)
    assert _equal(run_world(_load, world, source, cache, *layout), expected)
    entries = sorted(cache.glob(f"*/{SLICES}"))
    assert len(entries) == tp * pp, "one entry for each distinct set of slices"

    # Without the weights, only the cache can give them.
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for shard in source.glob("*.safetensors*"):
        shutil.move(shard, hidden)
    assert _equal(run_world(_load, world, source, cache, *layout), expected)

    # A damaged entry is named, read from the source and made whole again.
    for shard in hidden.iterdir():
        shutil.move(shard, source)
    content = bytearray(entries[0].read_bytes())
    content[-1] ^= 1
    entries[0].write_bytes(content)
    again = run_world(_load, world, source, cache, *layout)
    assert _equal(again, expected)
    assert 1 <= sum(str(entries[0]) in line for _, said in again for line in said) <= dp
    last = run_world(_load, world, source, cache, *layout)
    assert _equal(last, expected)
    assert not any(said for _, said in last)


def test_a_run_with_cached_slices_is_the_same_run(tiny_corpus_dir: Path, tmp_path: Path) -> None:
    lab = Lab.make(tiny_corpus_dir, tmp_path)
    settings = ("training.steps=2", "data.batch_size=4")
    expected = lab.train(2, tmp_path / "plain", *settings, tp=2)
    cold = lab.train(2, tmp_path / "cold", *settings, "llm.cache_slices=true", tp=2)
    warm = lab.train(2, tmp_path / "warm", *settings, "llm.cache_slices=true", tp=2)
    assert cold == warm == expected
    assert len(list((lab.cache / "sliced").glob(f"*/{SLICES}"))) == 2
