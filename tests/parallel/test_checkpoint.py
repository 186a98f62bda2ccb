"""Checkpoints of whole runs: what is in them, exact continuation, writing beside training, and damage of every kind."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mome_dist.checkpoint.format import CheckpointReader, find_checkpoint, seal_of
from mome_dist.checkpoint.hashes import content_hash, tensor_hash
from mome_dist.commands import inspect as inspect_checkpoint
from mome_dist.config import load_config
from mome_dist.errors import UserError
from mome_dist.preflight import validate
from mome_dist.training import loop, setup
from tests.parallel.resharding import forget_sharing
from tests.parallel.runs import Lab, lines
from tests.parallel.worlds import run_world


@pytest.fixture(scope="module")
def run(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with checkpoints after steps 2 and 4."""
    path = tmp_path_factory.mktemp("run")
    lab.train(2, path, "training.steps=4", "training.save_every=2", ep=2)
    return path


def test_a_checkpoint_says_what_made_it_and_where_to_go_on(run: Path) -> None:
    with CheckpointReader(find_checkpoint(run)) as reader:
        index = reader.index
        assert (index["step"], index["optimizer_steps"], index["optimizer"]) == (4, 4, "adamw")
        assert index["data"]["utterances_seen"] == 4 * 8 and index["data"]["order"]["data.batch_size"] == 8
        assert set(index["frozen"]) == {"llm", "audio_encoder", "video_encoder"}
        assert index["written_by"]["layout"]["ep"] == 2 and index["written_by"]["zero"] == 1
        assert {"config.yaml", "part-00000.safetensors", "part-00001.safetensors"} == set(index["files"])
        kinds = {name.split("/")[2] for name in reader.names("rng/")}
        assert {"python", "numpy", "torch", "megatron"} <= kinds
        model = {name.removeprefix("model/") for name in reader.names("model/")}
        for moment in ("exp_avg", "exp_avg_sq"):
            assert {name.removeprefix(f"optimizer/{moment}/") for name in reader.names(f"optimizer/{moment}/")} == model


def test_hashes_are_those_of_the_tensors_whatever_the_parts(run: Path) -> None:
    with CheckpointReader(find_checkpoint(run)) as reader:
        spread = 0
        for name, facts in reader.index["tensors"].items():
            by_row = facts["parts"][0]["start"] is not None
            spread += len(facts["parts"]) > 1
            assert tensor_hash(reader.read(name), by_row) == facts["sha256"]
        assert spread > 0 and reader.content == content_hash(reader.index["tensors"])


def test_the_content_hash_is_the_same_for_every_layout_that_holds_the_same(lab: Lab, tmp_path: Path) -> None:
    contents = set()
    for number, (world, tp, pp, ep) in enumerate([(1, 1, 1, 1), (2, 1, 1, 2), (4, 2, 2, 1)]):
        # Without a step of any size nothing is rounded, so every layout still has the same initial values.
        overrides = ["training.steps=1", "optimizer.learning_rate=0", "optimizer=sgd"]
        lab.train(world, tmp_path / str(number), *overrides, tp=tp, pp=pp, ep=ep)
        with CheckpointReader(find_checkpoint(tmp_path / str(number))) as reader:
            contents.add(reader.content)
    assert len(contents) == 1


def test_a_run_of_before_there_were_descriptions_continues(lab: Lab, tmp_path: Path) -> None:
    rate = "optimizer.final_fraction=1"  # which then does not depend on how many steps there will be
    straight = lab.train(2, tmp_path / "straight", "training.steps=3", rate, ep=2)
    lab.train(2, tmp_path / "old", "training.steps=2", rate, ep=2)
    forget_sharing(find_checkpoint(tmp_path / "old"))
    assert lab.train(2, tmp_path / "old", "training.steps=3", rate, ep=2) == straight[2:]


def test_200_flipped_bits_are_all_found(run: Path, tmp_path: Path) -> None:
    drawn = random.Random(0)
    whole = find_checkpoint(run)
    copy = tmp_path / whole.name
    shutil.copytree(whole, copy)
    with CheckpointReader(copy) as reader:
        reader.verify()
    files = sorted(copy.iterdir())
    # Every file at least once, then by size: most bytes are tensors.
    chosen = [*files, *drawn.choices(files, [path.stat().st_size for path in files], k=200 - len(files))]
    for path in chosen:
        content = path.read_bytes()
        place = drawn.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << drawn.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"), CheckpointReader(copy) as reader:
            reader.verify()
        path.write_bytes(content)


def test_missing_and_foreign_files_are_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(find_checkpoint(run), copy)
    (copy / "part-00009.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"part-00009\.safetensors, which is not of the checkpoint"):
        CheckpointReader(copy).verify()
    (copy / "part-00009.safetensors").unlink()
    (copy / "part-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"part-00001\.safetensors is missing or damaged"):
        CheckpointReader(copy).verify()
    (copy / "index.sha256").unlink()
    with pytest.raises(UserError, match=r"index\.sha256"):
        CheckpointReader(copy)


def test_inspection_shows_and_checks(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(find_checkpoint(run), copy)
    assert inspect_checkpoint.main([str(copy), "--tensors", "model/mome.1.router*"]) == 0
    shown = capsys.readouterr().out
    with CheckpointReader(copy) as reader:
        assert f"{len(reader.names())} tensors have their hashes" in shown and "model/mome.1.router_weight" in shown
        assert reader.content in shown.replace("\n", "").replace(" ", "").replace("│", "")
        index = {**reader.index, "content": "0" * 64}
    # A index that was edited by hand, seal and all: the tensors give it away.
    edited = json.dumps(index).encode()
    (copy / "index.json").write_bytes(edited)
    (copy / "index.sha256").write_bytes(seal_of(edited))
    assert inspect_checkpoint.main([str(copy)]) == 2
    assert "the content hash is not that of the tensors" in capsys.readouterr().err


def test_writing_beside_training_saves_the_same(lab: Lab, run: Path, tmp_path: Path) -> None:
    overrides = ["training.steps=4", "training.save_every=2", "training.async_save=true"]
    lab.train(2, tmp_path, *overrides, ep=2)
    for step in ("step-000002", "step-000004"):
        with (
            CheckpointReader(run / "checkpoints" / step) as sync,
            CheckpointReader(tmp_path / "checkpoints" / step) as beside,
        ):
            beside.verify()
            assert beside.content == sync.content


def _continue_differently(overrides: list[str], cache: Path, key: str) -> None:
    os.environ["MOME_DIST_CACHE"] = str(cache)
    config = load_config(overrides)
    layout = validate(config, int(os.environ["WORLD_SIZE"]))
    loop.train(config, layout)
    raise AssertionError(f"a run with another {key} went on")


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.batch_size", "4"), ("seed", "1"), ("data.bucket_batches", "2"), ("data.train_split", "validation")],
)
def test_a_run_that_would_lose_or_repeat_utterances_is_refused(
    lab: Lab, run: Path, tmp_path: Path, key: str, value: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    overrides = lab.overrides(tmp_path / "run", "training.steps=6", "parallel.ep=2", f"{key}={value}")
    with pytest.raises(RuntimeError, match=f"was trained with {key}=.*lost or repeated"):
        run_world(_continue_differently, 2, overrides, lab.cache, key)


def test_another_optimiser_is_refused(lab: Lab, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"optimizer\.name=adamw, now it is sgd"):
        lab.train(2, tmp_path / "run", "training.steps=6", "optimizer=sgd", ep=2)


def _draw_after_resuming(overrides: list[str], cache: Path) -> list[float]:
    """Train, then what the generators of this rank give next."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    config = load_config(overrides)
    drawn: list[float] = []
    prepare = setup.prepare

    def drawing(*arguments: object) -> setup.Trainer:
        trainer = prepare(*arguments)  # type: ignore[arg-type]
        if trainer.start:
            drawn.extend([random.random(), float(np.random.rand()), float(torch.rand(()))])
        return trainer

    module: Any = loop
    module.prepare = drawing
    saver: Any = setup.CheckpointSaver
    save = saver.save

    def scrambled(self: setup.CheckpointSaver, *arguments: object) -> None:
        # What a library might have drawn before a checkpoint; the same numbers must come after it.
        rank = dist.get_rank()
        random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
        save(self, *arguments)

    saver.save = scrambled
    loop.train(config, validate(config, int(os.environ["WORLD_SIZE"])))
    return drawn


def test_random_generators_continue_where_they_were(lab: Lab, tmp_path: Path) -> None:
    overrides = lab.overrides(tmp_path, "parallel.ep=2")
    run_world(_draw_after_resuming, 2, [*overrides, "training.steps=1"], lab.cache)
    drawn = run_world(_draw_after_resuming, 2, [*overrides, "training.steps=2"], lab.cache)
    for rank, numbers in enumerate(drawn):
        python, numpy = random.Random(rank), np.random.RandomState(rank)
        expected = [python.random(), numpy.rand(), float(torch.rand((), generator=torch.Generator().manual_seed(rank)))]
        assert numbers == pytest.approx(expected)


def test_the_metrics_of_a_resumed_run_have_every_step_once(lab: Lab, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    lab.train(2, tmp_path / "run", "training.steps=4", "training.save_every=2", ep=2)
    assert [record["step"] for record in lines(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]
    assert json.dumps(lines(tmp_path / "run/metrics.jsonl")[2]["views"]) == json.dumps(
        lines(run / "metrics.jsonl")[2]["views"]
    )
