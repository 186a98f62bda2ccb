"""Checkpoints between layouts and formats: DeepSpeed's own engine loads what is written offline, and what it saves
itself is read, tensor by tensor the same."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from mome_dist.checkpoint.format import CONFIG, CheckpointReader
from mome_dist.checkpoint.reshard import reshard
from mome_dist.config import load_config
from mome_dist.errors import UserError
from mome_dist.parallel.layout import Layout
from mome_dist.verification.probe import Probe, shrunk
from tests import forked_commands
from tests.parallel.resharding import (
    STEPS,
    TAG,
    Loaded,
    forget_sharing,
    load_and_train,
    train_and_save,
)
from tests.parallel.same_checkpoints import assert_same_checkpoint, assert_same_files, facts_and_tensors
from tests.parallel.worlds import run_world
from tests.patience import patience

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes and a ZeRO stage."""

    world: int
    zero: int
    axes: dict[str, Any]
    optimizer: str = "adamw"

    @property
    def layout(self) -> Layout:
        return Layout.for_world(self.world, **self.axes)


SOURCES = {
    "ep2 zero1": Topology(2, 1, {"ep": 2}),
    "tp2 pp2 zero2": Topology(4, 2, {"tp": 2, "pp": 2}),
    "ep4 zero0": Topology(4, 0, {"ep": 4}),
}
TARGETS = {
    "one process zero1": Topology(1, 1, {}),
    "pp2 ep2 zero0": Topology(4, 0, {"pp": 2, "ep": 2}),
    "tp2 ep2 zero2": Topology(4, 2, {"tp": 2, "ep": 2}),
    "pp2 ep2 interleaved zero2": Topology(4, 2, {"pp": 2, "ep": 2, "virtual": 2}),
    "dp4 ep2 zero1": Topology(4, 1, {"ep": 2}),
    "pp2, last stage without layers, zero1": Topology(2, 1, {"pp": 2, "stage_layers": (4, 0)}),
}


@dataclass(frozen=True)
class Saved:
    """A run's checkpoints after `STEPS` steps."""

    topology: Topology
    folder: Path
    losses: list[float]

    @property
    def canonical(self) -> Path:
        return self.folder / f"checkpoints/step-{STEPS:06d}"

    @property
    def native(self) -> Path:
        return self.folder / "native"


@dataclass(frozen=True)
class Bench:
    """A small model and the runs whose checkpoints are resharded."""

    probe: Probe
    saved: dict[str, Saved]

    def probe_for(self, topology: Topology) -> Probe:
        config = dataclasses.replace(self.probe.config)
        config.optimizer = dataclasses.replace(config.optimizer, name=topology.optimizer)
        return Probe(config, self.probe.steps)

    def train(self, topology: Topology, folder: Path) -> Saved:
        folder.mkdir()
        losses = run_world(
            train_and_save, topology.world, self.probe_for(topology), topology.layout, topology.zero, folder
        )
        return Saved(topology, folder, losses[0])

    def load(self, saved: Saved, there: Topology, native: Path, scratch: Path) -> list[Loaded]:
        """What the ranks of a topology find in a DeepSpeed checkpoint made from a saved one."""
        scratch.mkdir()
        arguments = (self.probe_for(there), there.layout, there.zero, native, saved.canonical, scratch)
        return run_world(load_and_train, there.world, *arguments)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("resharding")
    overrides = [
        "experiment=tiny",
        "llm.precision=fp32",
        "mome.capacity_factor=null",
        "mome.bias_rate=0.01",
        "optimizer.epsilon=1e-2",  # keeps rounding of gradients out of the weights (`mome_dist.verification.run`)
        "optimizer.warmup_steps=0",
        "training.steps=5",
        "task.asr_audio_rates=[4]",
        "task.vsr_video_rates=[2]",
        "task.avsr_audio_rates=[16]",
        "task.avsr_video_rates=[5]",
    ]
    made = Bench(Probe(shrunk(load_config(overrides), folder / "llm"), STEPS), {})
    for name, topology in SOURCES.items():
        made.saved[name] = made.train(topology, folder / name.replace(" ", "_"))
    return made


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_the_engine_loads_what_is_written_for_another_topology(
    bench: Bench, tmp_path: Path, source: str, target: str
) -> None:
    saved, there = bench.saved[source], TARGETS[target]
    native, scratch = tmp_path / "target", tmp_path / "scratch"
    outcome = reshard(saved.canonical, native, "deepspeed", there.layout, there.zero)
    assert outcome.source_content == outcome.target_content and not outcome.notes
    for rank in bench.load(saved, there, native, scratch):
        assert rank.different == []
        # fp32 sums in another order; weights, moments and step are the same numbers.
        assert rank.losses == pytest.approx(saved.losses, rel=1e-6)
        assert rank.client["record"]["step"] == STEPS
    assert_same_files(native / f"global_step{STEPS}", scratch / "native" / TAG)
    back = tmp_path / "back"
    reshard(native, back, "canonical", saved.topology.layout, saved.topology.zero)
    assert_same_checkpoint(saved.canonical, back)


@pytest.mark.parametrize("source", SOURCES)
def test_files_are_those_that_the_engine_itself_saves(bench: Bench, tmp_path: Path, source: str) -> None:
    saved = bench.saved[source]
    reshard(saved.canonical, tmp_path / "mine", "deepspeed", saved.topology.layout, saved.topology.zero)
    assert_same_files(tmp_path / "mine" / f"global_step{STEPS}", saved.native / TAG)


def _with_former_names(native: Path, folder: Path) -> Path:
    """A copy of an engine's checkpoint that calls the routers' biases as gates did before routers had a module."""
    shutil.copytree(native, folder)
    renamed = 0
    for path in (folder / TAG).glob("mp_rank_*_model_states.pt"):
        content = torch.load(path, weights_only=True)
        names = list(content["module"])
        content["module"] = {name.replace("gate.wg.bias", "gate.bias_E"): content["module"][name] for name in names}
        renamed += len(content["module"].keys() - names)
        torch.save(content, path)
    assert renamed, "no bias to rename"
    return folder


@pytest.mark.parametrize(("source", "former"), [*((source, False) for source in SOURCES), ("tp2 pp2 zero2", True)])
def test_what_an_engine_saved_is_read(bench: Bench, tmp_path: Path, source: str, former: bool) -> None:
    saved = bench.saved[source]
    native = _with_former_names(saved.native, tmp_path / "former") if former else saved.native
    outcome = reshard(native, tmp_path / "read", "canonical", Layout(1, 2, 2, 2), 1, saved.canonical / CONFIG)
    facts, tensors = facts_and_tensors(tmp_path / "read")
    expected_facts, expected = facts_and_tensors(saved.canonical)
    expected = {name: tensor for name, tensor in expected.items() if not name.startswith("rng/")}
    assert facts["content"] == expected_facts["content"] == outcome.target_content
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    for key in ("step", "optimizer_steps", "optimizer"):
        assert facts[key] == expected_facts[key]
    assert len(outcome.notes) == 3 and "no random-number generators" in outcome.notes[2]


def test_parts_are_cut_as_the_target_ranks_would_write_them(bench: Bench, tmp_path: Path) -> None:
    one, other = bench.saved["ep2 zero1"], bench.saved["tp2 pp2 zero2"]
    reshard(one.canonical, tmp_path / "there", "canonical", other.topology.layout, other.topology.zero)
    with CheckpointReader(tmp_path / "there") as mine, CheckpointReader(other.canonical) as theirs:
        assert mine.index["tensors"].keys() >= set(theirs.names("model/")) | set(theirs.names("optimizer/"))
        for name in (*theirs.names("model/"), *theirs.names("optimizer/")):
            assert mine.index["tensors"][name]["parts"] == theirs.index["tensors"][name]["parts"]
    reshard(tmp_path / "there", tmp_path / "back", "canonical", one.topology.layout, one.topology.zero)
    assert_same_checkpoint(one.canonical, tmp_path / "back")


def test_an_optimiser_without_moments(bench: Bench, tmp_path: Path) -> None:
    saved = bench.train(Topology(2, 1, {"ep": 2}, "sgd"), tmp_path / "sgd")
    for there in (Topology(2, 2, {"pp": 2}, "sgd"), Topology(1, 0, {}, "sgd")):
        native, scratch = tmp_path / f"zero{there.zero}", tmp_path / f"scratch{there.zero}"
        reshard(saved.canonical, native, "deepspeed", there.layout, there.zero)
        ranks = bench.load(saved, there, native, scratch)
        assert all(rank.different == [] and rank.losses == pytest.approx(saved.losses, rel=1e-6) for rank in ranks)
        assert_same_files(native / f"global_step{STEPS}", scratch / "native" / TAG)


def test_the_command_line(bench: Bench, tmp_path: Path) -> None:
    saved = bench.saved["ep2 zero1"]

    def run(*arguments: object) -> CompletedProcess[str]:
        command = ["tools/reshard_checkpoint.py", *map(str, arguments)]
        return forked_commands.run(command, ROOT, os.environ, patience(120))

    done = run(saved.native, tmp_path / "there", "--pp", 2, "--ep", 4, "--dp", 4, "--config", saved.canonical / CONFIG)
    assert done.returncode == 0, done.stderr
    hashes = [line.rpartition(" ")[2] for line in done.stdout.splitlines() if " content " in line]
    with CheckpointReader(tmp_path / "there") as reader:
        assert hashes == [reader.content, reader.content]
        assert len(reader.index["tensors"]["model/mome.0.routed.up_bias"]["parts"]) == 4
    assert "note: the source holds no random-number generators" in done.stdout
    again = run(saved.canonical, tmp_path / "there")
    assert again.returncode == 2 and again.stderr.splitlines()[-1].startswith("error: ") and "exists" in again.stderr


# -- what is refused


@pytest.fixture
def native(bench: Bench, tmp_path: Path) -> Path:
    """A DeepSpeed checkpoint to damage: its tag's directory."""
    reshard(bench.saved["ep2 zero1"].canonical, tmp_path / "native", "deepspeed", Layout(1, 2, 2, 2), 1)
    return tmp_path / "native" / f"global_step{STEPS}"


def refused(source: Path, tmp_path: Path, match: str, layout: Layout | None = None, **arguments: Any) -> None:
    target = tmp_path / "target"
    with pytest.raises(UserError, match=match):
        reshard(source, target, arguments.pop("format", "canonical"), layout or Layout(1, 1, 1, 1), 1, **arguments)
    assert not target.exists() and not list(tmp_path.glob(".target*")), "something half written is left"


def test_a_missing_file_is_named(native: Path, tmp_path: Path) -> None:
    (native / "layer_1_expert_5_mp_rank_01_model_states.pt").unlink()
    refused(native, tmp_path, r"layer_1_expert_5_mp_rank_01_model_states\.pt is missing")


def test_a_surplus_file_is_named(native: Path, tmp_path: Path) -> None:
    shutil.copy(native / "mp_rank_01_model_states.pt", native / "mp_rank_02_model_states.pt")
    refused(native, tmp_path, r"mp_rank_02_model_states\.pt is none of the files of 4 processes")


def test_a_truncated_file_is_named(native: Path, tmp_path: Path) -> None:
    path = native / "zero_pp_rank_1_mp_rank_01_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-200])
    refused(native, tmp_path, r"zero_pp_rank_1_mp_rank_01_optim_states\.pt cannot be read: damaged")


MARK = Path(tempfile.gettempdir()) / "a-checkpoint-ran-code"


class Malicious:
    """Unpickling it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {MARK}",)


def test_a_file_with_code_in_it_is_refused(native: Path, tmp_path: Path) -> None:
    name = "layer_0_expert_2_mp_rank_00_model_states.pt"
    torch.save({"weights": Malicious()}, native / name)
    refused(native, tmp_path, rf"{name} cannot be read: damaged, or holds what is not allowed.*system")
    assert not MARK.exists()


def test_a_replica_of_another_shape_is_named(native: Path, tmp_path: Path) -> None:
    name = "layer_0_expert_2_mp_rank_00_model_states.pt"
    content = torch.load(native / name, weights_only=True)
    key = "layer_0.deepspeed_moe.experts.deepspeed_experts.2.up.bias"
    content[key] = content[key][:3].clone()
    torch.save(content, native / name)
    refused(native, tmp_path, rf"{name}: {key} is torch\.float32 \[3\], expected torch\.float32 \[32\]")


def test_changed_numbers_do_not_pass(bench: Bench, native: Path, tmp_path: Path) -> None:
    name = "layer_0_expert_2_mp_rank_00_model_states.pt"
    content = torch.load(native / name, weights_only=True)
    content["layer_0.deepspeed_moe.experts.deepspeed_experts.2.up.bias"][0] += 1
    torch.save(content, native / name)
    refused(native, tmp_path, "do not have the content hash")
    copy = tmp_path / "copy"
    shutil.copytree(bench.saved["ep2 zero1"].canonical, copy)
    part = bytearray((copy / "part-00001.safetensors").read_bytes())
    part[-1] ^= 1
    (copy / "part-00001.safetensors").write_bytes(part)
    refused(copy, tmp_path, r"\w+ does not have the hash in the index")
    refused(copy, tmp_path, r"\w+ does not have the hash in the index", format="deepspeed")


def test_targets_that_do_not_fit_are_refused(bench: Bench, tmp_path: Path) -> None:
    source = bench.saved["ep2 zero1"].canonical
    refused(source, tmp_path, r"parallel\.ep=3 does not divide mome\.routed_experts=8", Layout(1, 1, 3, 3))
    refused(source, tmp_path, r"parallel\.pp=3 does not divide the LLM's 4 layers", Layout(1, 3, 1, 1))
    refused(source, tmp_path, r"parallel\.tp=4 does not divide", Layout(4, 1, 1, 1), format="deepspeed")
    refused(bench.saved["ep2 zero1"].native, tmp_path, r"config\.yaml with --config")
    refused(tmp_path, tmp_path, r"is an empty folder; name a run, a checkpoint")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists"):
        reshard(source, tmp_path / "there", "canonical", Layout(1, 1, 1, 1), 1)


def test_a_checkpoint_that_describes_nothing_is_read_as_before(bench: Bench, tmp_path: Path) -> None:
    """Checkpoints were written without descriptions; the same parts, files and descriptions come of them."""
    saved, there = bench.saved["ep2 zero1"], TARGETS["tp2 ep2 zero2"]
    old = tmp_path / "old"
    shutil.copytree(saved.canonical, old)
    forget_sharing(old)
    for name, source in (("of old", old), ("of new", saved.canonical)):
        reshard(source, tmp_path / name, "deepspeed", there.layout, there.zero)
        reshard(source, tmp_path / f"{name}, canonical", "canonical", there.layout, there.zero)
    assert_same_files(tmp_path / "of old/global_step2", tmp_path / "of new/global_step2")
    tensors = []
    for name in ("of old", "of new"):
        with CheckpointReader(tmp_path / f"{name}, canonical") as reader:
            reader.verify()
            tensors.append(reader.index["tensors"])
    assert tensors[0] == tensors[1]


def test_the_index_says_what_the_parts_are_for(bench: Bench, tmp_path: Path) -> None:
    reshard(bench.saved["ep4 zero0"].canonical, tmp_path / "there", "canonical", Layout(1, 2, 1, 1), 2)
    index = json.loads((tmp_path / "there/index.json").read_text())
    assert index["resharded"]["layout"]["pp"] == 2 and index["resharded"]["zero"] == 2
    assert index["written_by"]["layout"]["ep"] == 4 and index["written_by"]["zero"] == 0
