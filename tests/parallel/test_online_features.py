"""Encoding inside the step: without augmentation the features of the cache, with it the same ones at every layout."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import data_wait
from mome_dist.assets import asset_dir
from mome_dist.config import load_config
from mome_dist.config.schema import AugmentationConfig, NoiseConfig, RunConfig
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.encoding import load_encoder
from mome_dist.data.features import build_features
from mome_dist.data.prefetch import ClipLoader
from mome_dist.data.transforms import Augmentation, ModalityDropout
from mome_dist.errors import UserError
from mome_dist.preflight import validate
from mome_dist.training import online, setup
from mome_dist.training.loop import train
from mome_dist.training.online import OnlineEncoding, StepClips, StepFeatures
from tests.parallel.runs import Lab, lines, reference_validation
from tests.parallel.worlds import run_world

ONLINE = ["data.features=online", "training.log_utterances=true", "data.bucket_batches=1"]
AUGMENTED = [
    *ONLINE,
    "augmentation=paper",
    "augmentation.flip=0.5",
    "augmentation.modality_dropout.audio=0.3",
    "augmentation.modality_dropout.video=0.3",
    "augmentation.modality_dropout.audio_to=0.7",
    "augmentation.modality_dropout.schedule=linear",
    "task.cross_rate.route_kl=2",  # which leaves out the clips that lack a stream, on stages without encoders too
]


@pytest.fixture(scope="module")
def augmented(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """Losses and directory of a run in one process, with a checkpoint halfway."""
    output = tmp_path_factory.mktemp("augmented")
    return lab.train(1, output, *AUGMENTED, "training.save_every=3", "training.validate_every=5"), output


def test_without_augmentation_training_is_that_of_the_cache(lab: Lab, tmp_path: Path) -> None:
    cached = lab.train(2, tmp_path / "cached", "data.bucket_batches=1", ep=2)
    losses = lab.train(2, tmp_path / "online", *ONLINE, ep=2)
    # An encoder's sums depend on the shape of its batch, in the last bits of fp32 (about 1e-6 of a feature). Where such
    # a difference lies across a boundary of float16, one in 1e-6 / 2^-11, about 1 in 500, the feature moves by 2^-11:
    # over the thousands of independent features of a step that is sqrt(1 / 500) * 2^-11 / sqrt(1000) < 1e-6.
    np.testing.assert_allclose(losses, cached, rtol=5e-6)
    assert len(losses) == 5


def test_the_benchmark_of_waiting_trains_every_way_and_reads_its_log(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(module: str, processes: int, arguments: list[str]) -> int:
        """As the launcher, in forks that have imported what a new process takes ten seconds for."""
        output = Path(arguments[-1].removeprefix("output_dir="))
        return 0 if module == "mome_dist.train" and lab.train(processes, output, *arguments[1:]) else 1

    monkeypatch.setattr(data_wait, "launch", launch)
    monkeypatch.setattr(data_wait, "FIRST_STEPS", 1)
    results = tmp_path / "results"
    assert data_wait.main(["--nproc", "1", "--steps", "2", "--rounds", "1", "--results", str(results)]) == 0
    figures = json.loads((results / "data_wait.json").read_text())["figures"]
    assert set(figures) == set(data_wait.CASES)
    for case in figures.values():
        assert len(case["seconds"]) == 2
        assert all(0 < wait < step for wait, step in zip(case["data_wait_seconds"], case["seconds"], strict=True))
    rows = [line for line in (results / "data_wait.md").read_text().splitlines() if "in the step" in line]
    assert len(rows) == 2


def test_augmentation_is_felt(augmented: tuple[list[float], Path], lab: Lab, tmp_path: Path) -> None:
    clean = lab.train(1, tmp_path, *ONLINE)
    assert np.abs(np.array(clean) / augmented[0] - 1).max() > 1e-4


@pytest.mark.parametrize(
    ("world", "tp", "pp", "ep", "more"),
    [
        (2, 2, 1, 1, ()),
        (2, 1, 2, 1, ("parallel.virtual=2", "data.accumulation=2")),  # the interleaved schedule wants two microbatches
        (2, 1, 1, 2, ("data.decode_threads=3",)),
        (4, 2, 2, 1, ()),
    ],
)
def test_every_layout_trains_on_the_same_augmented_clips(
    augmented: tuple[list[float], Path], lab: Lab, tmp_path: Path, world: int, tp: int, pp: int, ep: int, more: tuple
) -> None:
    losses = lab.train(world, tmp_path, *AUGMENTED, *more, tp=tp, pp=pp, ep=ep)
    cut = [each for each in more if each.startswith("data.accumulation")]
    one = lab.train(1, tmp_path / "one", *AUGMENTED, *cut) if cut else augmented[0]
    np.testing.assert_allclose(losses, one, rtol=1e-5)
    assert noise_heard(tmp_path) == noise_heard(augmented[1])


def test_batches_by_frames_are_augmented_alike_too(lab: Lab, tmp_path: Path) -> None:
    frames = [*AUGMENTED, "data.batch_size=null", "data.max_frames=500", "training.steps=3"]
    one = lab.train(1, tmp_path / "one", *frames)
    np.testing.assert_allclose(lab.train(2, tmp_path / "two", *frames, tp=2), one, rtol=1e-5)


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 2)])
def test_a_resume_continues_with_the_same_augmented_clips(
    augmented: tuple[list[float], Path], lab: Lab, tmp_path: Path, world: int, tp: int
) -> None:
    losses, whole = augmented
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints/step-000005")
    (broken / "checkpoints/latest").write_text("step-000003")
    rest = lab.train(world, broken, *AUGMENTED, tp=tp)
    if world == 1:
        assert rest == losses[3:]
    np.testing.assert_allclose(rest, losses[3:], rtol=1e-5)
    assert noise_heard(broken) == noise_heard(whole)


def noise_heard(run: Path) -> list[dict]:
    """What the ranks of a run wrote about noise, in the order of steps and utterances."""
    written = [line for path in (run / "noise").glob("rank-*.jsonl") for line in lines(path)]
    return sorted(written, key=lambda line: (line["step"], line["id"]))


def test_the_noise_of_every_clip_is_written_down(augmented: tuple[list[float], Path]) -> None:
    heard = noise_heard(augmented[1])
    steps = [record for record in lines(augmented[1] / "metrics.jsonl") if "loss" in record]
    assert [(line["step"], line["id"]) for line in heard] == [
        (step["step"], name) for step in steps for name in sorted(step["utterances"])
    ]
    for line in heard:
        if line["snr"] is None:
            assert line["measured"] is None and line["origins"] == []
        else:
            assert line["measured"] == pytest.approx(line["snr"], abs=0.1) and len(line["origins"]) == 8
    assert len({line["snr"] for line in heard}) > 3, "several ratios are among them"


def test_a_fresh_start_forgets_the_noise_of_a_larger_world(lab: Lab, tmp_path: Path) -> None:
    steps = [*AUGMENTED, "training.steps=1"]
    lab.train(2, tmp_path, *steps, ep=2)
    lab.train(1, tmp_path, *steps, "training.resume=false")
    assert len(noise_heard(tmp_path)) == 8 == len(lines(tmp_path / "noise/rank-0.jsonl"))
    lab.train(1, tmp_path / "unlogged", *steps, "augmentation.noise.log=false")
    assert not (tmp_path / "unlogged/noise").exists()


def test_the_wait_for_data_is_logged(augmented: tuple[list[float], Path]) -> None:
    records = [record for record in lines(augmented[1] / "metrics.jsonl") if "loss" in record]
    assert len(records) == 5
    assert all(0 <= record["data_wait_seconds"] < record["seconds"] for record in records)


def test_validation_stays_clean(augmented: tuple[list[float], Path], lab: Lab) -> None:
    validation = lines(augmented[1] / "metrics.jsonl")[-1]["validation"]
    expected = run_world(reference_validation, 1, augmented[1], lab.cache)[0]
    assert validation == pytest.approx(expected, rel=1e-5)


def _made(
    corpus_dir: Path, video_encoder: Path, clips_together: int, utterances: int
) -> tuple[dict[tuple[str, str], np.ndarray], bool]:
    """The clean features of a step on a tensor-parallel rank of a world that has no other axis."""
    dist.init_process_group("gloo")
    online.CLIPS_TOGETHER = clips_together
    corpus, config = Corpus.open(corpus_dir), RunConfig()
    config.audio_encoder.path, config.audio_encoder.padding = str(asset_dir("whisper-tiny.en")), "clip"
    config.video_encoder.path = str(video_encoder)
    encoders = {stream: load_encoder(config, stream, torch.device("cpu")) for stream in ("audio", "video")}
    loader = ClipLoader(corpus, Augmentation.open(AugmentationConfig(), corpus, "train", 0), 1)
    chosen = corpus.split("train")[:utterances]
    held, group = StepFeatures(ModalityDropout(0, 0, 0)), dist.group.WORLD
    assert group is not None

    def plan(step: int) -> StepClips:
        return StepClips(chosen, ["audio", "video"], 0)

    encoding = OnlineEncoding(held, loader, encoders, plan, 1, group, torch.device("cpu"))
    encoding.load(0)
    encoding.close()
    dist.destroy_process_group()
    training = any(module.training for encoder in encoders.values() for module in encoder.modules())
    features = {(s, u.id): held.reader(s)(u.id).numpy() for s in encoders for u in chosen}
    return features, training


def _cached_one_by_one(
    corpus_dir: Path, video_encoder: Path, directory: Path, utterances: int
) -> dict[tuple[str, str], np.ndarray]:
    """Features of the feature store, where every clip was encoded by itself."""
    corpus, config = Corpus.open(corpus_dir), RunConfig()
    found: dict[tuple[str, str], np.ndarray] = {}
    config.audio_encoder.path, config.audio_encoder.padding = str(asset_dir("whisper-tiny.en")), "clip"
    config.video_encoder.path = str(video_encoder)
    chosen = corpus.split("train")[:utterances]
    for stream in ("audio", "video"):
        encoder = load_encoder(config, stream, torch.device("cpu"))
        read = corpus.audio if stream == "audio" else corpus.video

        def encode(batch: list[Utterance], encoder=encoder, read=read) -> list[Tensor]:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                return encoder([torch.from_numpy(read(each)) for each in batch])

        store = build_features("encoder", encode, chosen, directory / stream, batch_size=1)
        found |= {(stream, each.id): store.get(each.id).numpy() for each in chosen}
    return found


def _made_in_turn(
    corpus_dir: Path, video_encoder: Path, ahead: bool
) -> tuple[list[dict[tuple[str, str], np.ndarray]], list[str]]:
    """Features of three steps of augmented clips, and what was done in which order."""
    dist.init_process_group("gloo")
    corpus, config, order = Corpus.open(corpus_dir), RunConfig(), list[str]()
    config.audio_encoder.path, config.audio_encoder.padding = str(asset_dir("whisper-tiny.en")), "clip"
    config.video_encoder.path = str(video_encoder)
    encoders = {stream: load_encoder(config, stream, torch.device("cpu")) for stream in ("audio", "video")}
    for stream, encoder in encoders.items():
        encoder.register_forward_hook(lambda *_, stream=stream: order.append(stream))
    augmentation = Augmentation.open(AugmentationConfig(flip=0.5, noise=NoiseConfig("babble")), corpus, "train", 0)
    held, group, train_split = StepFeatures(ModalityDropout(0, 0, 0)), dist.group.WORLD, corpus.split("train")
    assert group is not None

    def plan(step: int) -> StepClips:
        return StepClips(train_split[4 * step : 4 * step + 4], ["audio", "video"], step)

    loader = ClipLoader(corpus, augmentation, 1)
    encoding = OnlineEncoding(held, loader, encoders, plan, 3, group, torch.device("cpu"), ahead=ahead)
    made = []
    for step in range(3):
        encoding.load(step)
        order.append(f"step {step}")
        made.append({(s, u.id): held.reader(s)(u.id).numpy().copy() for s in encoders for u in plan(step).utterances})
        encoding.load_ahead(step + 1)
        done, began = 2 * min(step + 1 + ahead, 3), time.monotonic()
        while sum(each in encoders for each in order) < done and time.monotonic() < began + 60:
            time.sleep(0.01)  # the passes of the step take long enough
        order.append("passes")
    encoding.close()
    dist.destroy_process_group()
    return made, order


def test_encoding_ahead_gives_the_same_bits_earlier(lab: Lab) -> None:
    (in_turn, order), (ahead, ahead_order) = (
        run_world(_made_in_turn, 1, lab.corpus, lab.video_encoder, ahead)[0] for ahead in (False, True)
    )
    encoded = ["audio", "video"]
    assert order == [*encoded, "step 0", "passes", *encoded, "step 1", "passes", *encoded, "step 2", "passes"]
    assert ahead_order == [*encoded, "step 0", *encoded, "passes", "step 1", *encoded, "passes", "step 2", "passes"]
    for one, other in zip(in_turn, ahead, strict=True):
        assert one.keys() == other.keys() and len(one) == 8
        assert all(np.array_equal(value, other[key]) for key, value in one.items())


def _train_ahead(overrides: list[str], cache: Path) -> list[float]:
    """Train with encoders that work ahead, as they do on a GPU."""
    os.environ["MOME_DIST_CACHE"] = str(cache)

    class EncodingAhead(OnlineEncoding):
        def __init__(self, *arguments: Any) -> None:
            encoders = arguments[2]
            super().__init__(*arguments[:-1], ahead=bool(encoders))  # type: ignore[misc]

    setup.OnlineEncoding = EncodingAhead  # type: ignore[assignment, misc]
    config = load_config(overrides)
    return train(config, validate(config, int(os.environ["WORLD_SIZE"])))


@pytest.mark.parametrize(("world", "both"), [(1, 1), (4, 2)])
def test_a_run_that_encodes_ahead_is_the_same_run(lab: Lab, tmp_path: Path, world: int, both: int) -> None:
    """Losses and noise, on ranks that share the clips, and beside a stage that has no encoders."""
    expected = lab.train(world, tmp_path / "in turn", *AUGMENTED, tp=both, pp=both)
    layout = [f"parallel.tp={both}", f"parallel.pp={both}", "parallel.ep=1"]
    run = lab.overrides(tmp_path / "ahead", *AUGMENTED, *layout)
    assert run_world(_train_ahead, world, run, lab.cache, timeout=180) == [expected] * world
    assert noise_heard(tmp_path / "ahead") == noise_heard(tmp_path / "in turn")


def _digest(features: dict[tuple[str, str], np.ndarray]) -> str:
    return hashlib.sha256(b"".join(features[key].tobytes() for key in sorted(features))).hexdigest()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_features_are_the_bits_of_the_cache_on_every_tensor_parallel_rank(lab: Lab, tmp_path: Path, world: int) -> None:
    """Clips are encoded one by one; two and three ranks share five clips of unequal lengths unevenly."""
    expected = run_world(_cached_one_by_one, 1, lab.corpus, lab.video_encoder, tmp_path, 5)[0]
    for features, training in run_world(_made, world, lab.corpus, lab.video_encoder, 1, 5):
        assert not training, "frozen encoders stay in eval mode"
        assert features.keys() == expected.keys() and len(expected) == 10
        for key, value in features.items():
            assert value.dtype == np.float16
            np.testing.assert_array_equal(value, expected[key], str(key))


def test_more_ranks_than_clips(lab: Lab, tmp_path: Path) -> None:
    one, two = (run_world(_made, world, lab.corpus, lab.video_encoder, 8, 1) for world in (1, 2))
    assert _digest(one[0][0]) == _digest(two[0][0]) == _digest(two[1][0])


@pytest.fixture(scope="module")
def damaged(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, str]:
    """A copy of the corpus with one training video overwritten, and the utterance's id."""
    folder = tmp_path_factory.mktemp("damaged")
    corpus = Corpus.open(shutil.copytree(lab.corpus, folder / "corpus"))
    utterance = corpus.split("train")[7]
    offset, size = utterance.members["mp4"]
    with (folder / "corpus" / utterance.shard).open("r+b") as shard:
        shard.seek(offset + size // 2)
        shard.write(bytes(64))
    return replace(lab, corpus=folder / "corpus", cache=folder / "cache"), utterance.id


def _refusal(overrides: list[str], cache: Path) -> str:
    """What a rank says when it stops."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    config = load_config(overrides)
    with pytest.raises(UserError) as error:
        train(config, validate(config, int(os.environ["WORLD_SIZE"])))
    return str(error.value)


def test_a_damaged_clip_stops_every_rank_by_name(damaged: tuple[Lab, str], tmp_path: Path) -> None:
    """One of two tensor-parallel ranks of the first of two pipeline stages meets it."""
    lab, name = damaged
    overrides = lab.overrides(tmp_path, *AUGMENTED, "task=vsr", "parallel.ep=1", "parallel.tp=2", "parallel.pp=2")
    refusals = run_world(_refusal, 4, overrides, lab.cache)
    assert all(f"{name}.mp4: its bytes have changed" in refusal for refusal in refusals), refusals


def test_damaged_clips_may_be_left_out(damaged: tuple[Lab, str], tmp_path: Path) -> None:
    lab, name = damaged
    losses = lab.train(2, tmp_path, *AUGMENTED, "task=vsr", "data.max_damaged_utterances=1", tp=2)
    used = [each for record in lines(tmp_path / "metrics.jsonl") for each in record["utterances"]]
    assert len(losses) == 5 and len(set(used)) == 23 and name not in used
