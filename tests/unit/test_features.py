"""The feature store: what goes in comes out, from any number of writers, and damage is seen."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mome_dist.data.corpus import Utterance
from mome_dist.data.damage import check_damage, forget_damage
from mome_dist.data.features import (
    FeatureStore,
    build_features,
    encoder_fingerprint,
    feature_directory,
    to_float16,
)
from mome_dist.errors import DamagedDataError, UserError

UTTERANCES = [Utterance(f"u{i:03d}", "s.tar", "words", "speaker", 320 * (i % 7 + 1), 1, {}) for i in range(23)]


def features_of(utterance: Utterance) -> Tensor:
    generator = torch.Generator().manual_seed(int(utterance.id[1:]))
    return torch.randn(utterance.samples // 320, 6, generator=generator)


class Encoder:
    """Counts what it is asked to encode."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, batch: list[Utterance]) -> list[Tensor]:
        self.seen += [utterance.id for utterance in batch]
        return [features_of(utterance) for utterance in batch]


def check(store: FeatureStore) -> None:
    assert len(store) == len(UTTERANCES)
    for utterance in UTTERANCES:
        features = store.get(utterance.id)
        assert features.dtype == torch.float16
        torch.testing.assert_close(features, features_of(utterance).half(), rtol=0, atol=0)


def test_round_trip_and_second_call_encodes_nothing(tmp_path: Path) -> None:
    first, second = Encoder(), Encoder()
    check(build_features("toy", first, UTTERANCES, tmp_path / "train", batch_size=4))
    assert sorted(first.seen) == [utterance.id for utterance in UTTERANCES]
    check(build_features("toy", second, UTTERANCES, tmp_path / "train"))
    assert second.seen == []
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_ranks_that_see_different_parts_of_another_run_encode_all_together(tmp_path: Path) -> None:
    """Rank 1 looks when another run has written half of the store, rank 0 has looked before."""
    build_features("toy", Encoder(), UTTERANCES[:1], tmp_path)
    barrier, told, looked = threading.Barrier(2), [], threading.Event()

    def share(ids: list[str]) -> list[str]:
        if threading.current_thread().name == "0":
            told.append(ids)
            looked.set()
        barrier.wait(30)
        return told[0]

    def wait() -> None:
        barrier.wait(30)

    def work(rank: int) -> None:
        if rank == 1:
            looked.wait(30)
            build_features("toy", Encoder(), UTTERANCES[:12], tmp_path)
        check(build_features("toy", Encoder(), UTTERANCES, tmp_path, rank, 2, wait, share, 1))

    with ThreadPoolExecutor(2) as pool:

        def named(rank: int) -> None:
            threading.current_thread().name = str(rank)
            work(rank)

        for done in [pool.submit(named, rank) for rank in range(2)]:
            done.result(60)


def test_ranks_share_the_work_and_anyone_reads_it(tmp_path: Path) -> None:
    encoders = [Encoder() for _ in range(3)]
    barrier = threading.Barrier(3)

    def wait() -> None:
        barrier.wait(30)

    def work(rank: int) -> None:
        check(build_features("toy", encoders[rank], UTTERANCES, tmp_path, rank, 3, wait, batch_size=4))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(encoder.seen) for encoder in encoders) == [7, 8, 8]  # 6 batches of at most 4
    assert len(list(tmp_path.glob("part-*"))) == 3
    check(FeatureStore(tmp_path))
    alone = Encoder()
    check(build_features("toy", alone, UTTERANCES, tmp_path))
    assert alone.seen == []


def test_truncated_part_is_reported_and_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_features("toy", Encoder(), UTTERANCES[:10], tmp_path)
    (damaged,) = tmp_path.glob("part-*")
    build_features("toy", Encoder(), UTTERANCES, tmp_path)
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(UserError, match=damaged.name):
        FeatureStore(tmp_path)
    again = Encoder()
    with caplog.at_level(logging.WARNING):
        check(build_features("toy", again, UTTERANCES, tmp_path))
    assert damaged.name in caplog.text
    assert sorted(again.seen) == [utterance.id for utterance in UTTERANCES[:10]]


def test_changed_bytes_are_seen_when_read(tmp_path: Path) -> None:
    build_features("toy", Encoder(), UTTERANCES, tmp_path)
    (part,) = tmp_path.glob("part-*")
    content = bytearray(part.read_bytes())
    content[-1] ^= 0x40
    part.write_bytes(content)
    store = FeatureStore(tmp_path)
    with pytest.raises(UserError, match="damaged"):
        for utterance in UTTERANCES:
            store.get(utterance.id)


def test_deleted_part_is_encoded_again_and_missing_ids_are_named(tmp_path: Path) -> None:
    build_features("toy", Encoder(), UTTERANCES[:5], tmp_path)
    with pytest.raises(UserError, match="'u020'"):
        FeatureStore(tmp_path).get("u020")
    for part in tmp_path.glob("part-*"):
        part.unlink()
    with pytest.raises(UserError, match="holds no features"):
        FeatureStore(tmp_path)
    check(build_features("toy", Encoder(), UTTERANCES, tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0])
def test_values_outside_float16_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(UserError, match="u000"):
        build_features("toy", lambda batch: [torch.full((2, 3), value) for _ in batch], UTTERANCES[:1], tmp_path)
    assert list(tmp_path.glob("part-*")) == []


class Looks(TorchDispatchMode):
    """Counts how often the host asks the device for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):  # type: ignore[no-untyped-def]
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(named or {}))


def test_features_of_a_batch_are_looked_at_once() -> None:
    clips = [features_of(utterance) for utterance in UTTERANCES[:8]]
    ids = [utterance.id for utterance in UTTERANCES[:8]]
    with Looks() as looks:
        rounded = to_float16(clips, ids, "toy")
    assert looks.count == 1
    assert all(torch.equal(one, clip.half()) for one, clip in zip(rounded, clips, strict=True))
    assert to_float16([], [], "toy") == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -70_000.0])
def test_the_one_that_is_wrong_is_named(value: float) -> None:
    clips = [features_of(utterance) for utterance in UTTERANCES[:8]]
    ids = [utterance.id for utterance in UTTERANCES[:8]]
    clips[5][3, 2] = value
    with pytest.raises(UserError, match=r"'toy' gives 'u005' features .* finite and at most 65504"):
        to_float16(clips, ids, "toy")
    clips[5] = clips[5][0]
    with pytest.raises(UserError, match=r"'u005' features of shape \[6\]"):
        to_float16(clips, ids, "toy")
    clips[5] = torch.zeros(4, 7)
    with pytest.raises(UserError, match=r"'u005' features of shape \[4, 7\]"):
        to_float16(clips, ids, "toy")


def test_another_encoder_needs_another_directory(tmp_path: Path) -> None:
    build_features("toy-1", Encoder(), UTTERANCES, tmp_path)
    with pytest.raises(UserError, match="toy-2"):
        build_features("toy-2", Encoder(), UTTERANCES, tmp_path)
    assert feature_directory(tmp_path, "a" * 64, "toy-1", "train") == tmp_path / ("a" * 16) / "toy-1" / "train"


def test_fingerprint_follows_weights_and_settings() -> None:
    torch.manual_seed(0)
    encoder = nn.Linear(3, 2)
    before = encoder_fingerprint(encoder, {"padding": "clip"})
    assert before == encoder_fingerprint(encoder, {"padding": "clip"})
    assert before != encoder_fingerprint(encoder, {"padding": "30s"})
    with torch.no_grad():
        encoder.weight[0, 0] += 1e-3
    assert before != encoder_fingerprint(encoder, {"padding": "clip"})


class Damaged(Encoder):
    """Cannot read some utterances."""

    def __init__(self, *damaged: str) -> None:
        super().__init__()
        self.damaged = damaged

    def __call__(self, batch: list[Utterance]) -> list[Tensor]:
        for utterance in batch:
            if utterance.id in self.damaged:
                raise DamagedDataError(f"s.tar: {utterance.id}.flac: cannot decode")
        return super().__call__(batch)


def test_damaged_utterances_are_recorded_and_not_tried_again(tmp_path: Path) -> None:
    store = build_features("toy", Damaged("u003", "u011"), UTTERANCES, tmp_path, batch_size=4)
    assert store.damaged == {f"u{n}": f"s.tar: u{n}.flac: cannot decode" for n in ("003", "011")}
    assert len(store) == len(UTTERANCES) - 2
    sound = Encoder()
    assert build_features("toy", sound, UTTERANCES, tmp_path).damaged.keys() == {"u003", "u011"}
    assert sound.seen == []  # the record, not luck, decides what a resume leaves out
    forget_damage(tmp_path)
    check(build_features("toy", sound, UTTERANCES, tmp_path))
    assert sorted(sound.seen) == ["u003", "u011"]


def test_too_many_damaged_utterances_are_refused_with_the_first_names(tmp_path: Path) -> None:
    damage = {f"u{number}": f"shard-{number}.tar: u{number}.flac: cannot decode" for number in range(7)}
    check_damage("train", damage, 7)
    with pytest.raises(
        UserError, match=r"7 utterances of split 'train'.*shard-4\.tar: u4\.flac.*and 2 more"
    ) as refused:
        check_damage("train", damage, 6)
    assert "u5" not in str(refused.value) and "data.max_damaged_utterances=7 (now 6)" in str(refused.value)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    build_features("toy", Damaged("u003"), UTTERANCES, tmp_path)
    (record,) = tmp_path.glob("damaged-*.json")
    record.write_text(record.read_text()[:-4])
    with pytest.raises(UserError, match=record.name):
        FeatureStore(tmp_path)
