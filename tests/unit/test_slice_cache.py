"""The cache of slices gives back the same bits, or nothing and a reason."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mome_dist.llm.slice_cache import DESCRIPTION, LOCK, SLICES, SliceCache

SLICING = {"tp": 2, "tp_rank": 1, "layers": [2, 3], "dtype": "bfloat16"}


def _parameters(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.weight": torch.randn(6, 4, generator=generator).to(torch.bfloat16),
        "norm.weight": torch.randn(4, generator=generator),
    }


def _read(cache: SliceCache, slicing: dict = SLICING) -> dict[str, Tensor] | None:
    target = {name: torch.full_like(tensor, 7) for name, tensor in _parameters().items()}
    return target if cache.read(slicing, target) else None


def _is_kept(found: dict[str, Tensor] | None) -> bool:
    return found is not None and all(torch.equal(found[name], tensor) for name, tensor in _parameters().items())


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, said: list[str]) -> SliceCache:
    return SliceCache(tmp_path / "sliced", "source-hash", said.append)


def test_what_is_kept_comes_back_bit_for_bit(cache: SliceCache, said: list[str]) -> None:
    assert _read(cache) is None
    cache.write(SLICING, _parameters())
    assert _is_kept(_read(cache))
    assert said == []
    assert sorted(path.name for path in cache.entry(SLICING).iterdir()) == sorted([SLICES, DESCRIPTION, LOCK])


def test_another_source_or_slicing_is_another_entry(cache: SliceCache, tmp_path: Path, said: list[str]) -> None:
    cache.write(SLICING, _parameters())
    for slicing in ({**SLICING, "tp_rank": 0}, {**SLICING, "dtype": "float32"}, {**SLICING, "layers": [2]}):
        assert _read(cache, slicing) is None
    assert _read(SliceCache(tmp_path / "sliced", "other-hash", said.append)) is None


def test_an_entry_is_written_once(cache: SliceCache) -> None:
    cache.write(SLICING, _parameters())
    cache.write(SLICING, _parameters(seed=1))
    assert _is_kept(_read(cache))


def test_a_rank_that_finds_another_writing_goes_on(cache: SliceCache) -> None:
    cache.entry(SLICING).mkdir(parents=True)
    with (cache.entry(SLICING) / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.write(SLICING, _parameters())
        assert _read(cache) is None
    cache.write(SLICING, _parameters())
    assert _is_kept(_read(cache))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda entry: _flip(entry / SLICES), r"is damaged (its SHA-256 differs)"),
    "cut": (lambda entry: (entry / SLICES).write_bytes((entry / SLICES).read_bytes()[:-9]), "bytes instead of"),
    "gone": (lambda entry: (entry / SLICES).unlink(), "cannot be read (No such file or directory)"),
    "description": (lambda entry: (entry / DESCRIPTION).write_text("{"), "has an unreadable slices.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_named_and_rebuilt(cache: SliceCache, said: list[str], kind: str) -> None:
    damage, reason = DAMAGE[kind]
    cache.write(SLICING, _parameters())
    damage(cache.entry(SLICING))
    assert _read(cache) is None
    assert len(said) == 1 and reason in said[0] and str(cache.entry(SLICING) / SLICES) in said[0]
    cache.write(SLICING, _parameters())
    assert _is_kept(_read(cache))
    assert len(said) == 1


def test_an_unfinished_entry_counts_as_none(cache: SliceCache, said: list[str]) -> None:
    cache.write(SLICING, _parameters())
    (cache.entry(SLICING) / DESCRIPTION).unlink()  # written last
    assert _read(cache) is None
    assert said == []


def test_an_entry_for_another_model_is_not_used(cache: SliceCache, said: list[str]) -> None:
    cache.write(SLICING, _parameters())
    assert not cache.read(SLICING, {"layers.0.weight": torch.zeros(6, 5), "norm.weight": torch.zeros(4)})
    assert "holds other tensors than the model" in said[0]


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").write_text("")
    cache = SliceCache(tmp_path / "file" / "sliced", "source-hash", said.append)
    cache.write(SLICING, _parameters())
    assert len(said) == 1 and "cannot be written" in said[0]
