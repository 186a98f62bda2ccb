"""Writing checkpoints: a snapshot on every rank, each rank its own part, then one rename makes it visible.

Parts are written into a hidden directory beside the final one, named by the owner of the run; after all ranks are done,
rank 0 writes the index, flushes everything to disk, sees that the run is still its own, renames the directory and moves
``latest``. A crash or a full disk at any moment leaves the previous checkpoint. With ``training.async_save`` only the
snapshot happens between two steps; a thread does the rest while training goes on, and the ranks' threads agree over a
process group of their own.
"""

from __future__ import annotations

import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mome_dist.checkpoint.format import (
    CONFIG,
    LATEST,
    Part,
    checkpoints_of,
    complete,
    describe_part,
    file_facts,
    index_of,
    merge_parts,
    newest_checkpoint,
)
from mome_dist.checkpoint.random_state import random_state
from mome_dist.checkpoint.select import best_of, validated_checkpoints
from mome_dist.config import RunConfig, save_config
from mome_dist.engine.engine import Engine
from mome_dist.errors import UserError
from mome_dist.files import fsync, save_tensors, write_text
from mome_dist.model.distributed import DistributedMoME
from mome_dist.ownership import Ownership
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.parts import by_parameter
from mome_dist.parallel.whereabouts import wait_for_all
from mome_dist.sharing import Sharing
from mome_dist.system_errors import explain
from mome_dist.versions import version_of

PACKAGES = ("mome_dist", "torch", "megatron-core", "deepspeed")
# Suffixes of a checkpoint that makes way for another of the same step, and of one that is being removed.
_REPLACED, _GONE = ".old", ".gone"
T = TypeVar("T")


@dataclass(frozen=True)
class Held:
    """What a rank writes of a tensor.

    Attributes:
        values: on the CPU; experts are stacked.
        first: the number of the first expert; None for a whole tensor.
        sharing: of the tensor among the ranks; None for what belongs to this rank.
    """

    values: Tensor
    first: int | None = None
    sharing: Sharing | None = None


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of the state after a step, in memory of its own on the CPU.

    Attributes:
        tensors: by global name.
        facts: of the index that the state decides.
    """

    tensors: dict[str, Held]
    facts: dict[str, Any]


class CheckpointSaver:
    """Writes the checkpoints of a run. All methods are collective.

    Args:
        config: of the run; says where checkpoints go, how many are kept, and whether they are written beside training.
        layout: of the run.
        frozen: fingerprints of the frozen parts, by name.
        order: what the order of utterances is a function of, by configuration key.
        seen: utterances that were trained on before a step.
        ownership: of the run's directory, on rank 0; None on the others.

    Raises:
        UserError: from each method, on all ranks, if a rank could not write (such as a full disk), or another run has
            taken the directory over. What was published before stays as it is.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        frozen: dict[str, str],
        order: dict[str, Any],
        seen: Callable[[int], int],
        ownership: Ownership | None,
    ) -> None:
        self._config, self._layout, self._frozen, self._order, self._seen = config, layout, frozen, order, seen
        self._folder = Path(config.output_dir) / "checkpoints"
        self._ownership = ownership
        if ownership is not None:
            sweep_checkpoints(self._folder)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.parallel.timeout_seconds))
        owners = self._together(lambda: None if ownership is None else ownership.token)
        self._owner = next(token for token in owners if token is not None)
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def save(self, step: int, model: DistributedMoME, engine: Engine) -> None:
        """Take a snapshot after ``step`` steps and write it, or start to."""
        self.finish()
        snapshot = self._snapshot(step, model, engine)
        # A daemon: a run that stops for another reason must not wait for a disk.
        self._thread = threading.Thread(target=self._write_noting_problems, args=(step, snapshot), daemon=True)
        self._thread.start()
        if not self._config.training.async_save:
            self.finish()

    def finish(self) -> None:
        """Wait until what was saved last is published."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def _snapshot(self, step: int, model: DistributedMoME, engine: Engine) -> Snapshot:
        facts = {
            "step": step,
            "layers": model.config.num_layers,
            "optimizer": self._config.optimizer.name,
            "optimizer_steps": engine.steps,
            "data": {"order": self._order, "utterances_seen": self._seen(step)},
            "written_by": {"layout": asdict(self._layout), "zero": engine.zero_stage},
            "versions": {name: version_of(name) for name in PACKAGES},
            "frozen": self._frozen,
        }
        return Snapshot(collect(model, engine), facts)

    def _write_noting_problems(self, step: int, snapshot: Snapshot) -> None:
        try:
            self._write(step, snapshot)
        except BaseException as error:
            self._problem = error  # raised by `finish`

    def _write(self, step: int, snapshot: Snapshot) -> None:
        final = self._folder / f"step-{step:06d}"
        aside = self._folder / f".{final.name}.{self._owner}.tmp"
        rank, ownership = dist.get_rank(), self._ownership

        def prepare() -> None:
            if ownership is not None:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)

        def publish() -> None:
            if ownership is not None:
                files = {name: facts for part in written for name, facts in part["files"].items()}
                save_config(self._config, aside / CONFIG)
                files[CONFIG] = file_facts(aside / CONFIG)
                tensors = merge_parts(part["tensors"] for part in written)
                publish_checkpoint(aside, final, index_of(snapshot.facts, files, tensors), ownership.check)
                prune(Path(self._config.output_dir), self._config.training.keep_checkpoints)

        try:
            self._together(prepare)
            written = self._together(lambda: _write_part(aside, rank, snapshot.tensors))
            self._together(publish)
        except _CannotWriteError as error:
            if ownership is not None:
                shutil.rmtree(aside, ignore_errors=True)
            raise UserError(
                f"the checkpoint of step {step} could not be written; those before it are whole. {error}"
            ) from error

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Do something on every rank and return all results; if it fails on one, all ranks raise."""
        outcome: tuple[T | None, str | None]
        try:
            outcome = work(), None
        except OSError as error:
            outcome = None, f"rank {dist.get_rank()}: {explain(error) or error}"
        except UserError as error:  # another run owns the directory now
            outcome = None, str(error)
        wait_for_all("writing a checkpoint", self._group)
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=self._group)
        problems = [problem for _, problem in outcomes if problem is not None]
        if problems:
            raise _CannotWriteError("; ".join(problems))
        return [result for result, _ in outcomes]


class _CannotWriteError(Exception):
    """A rank could not write; the message says which and why."""


def collect(model: DistributedMoME, engine: Engine) -> dict[str, Held]:
    """Copies of this rank's share of the state, as in `Snapshot.tensors` (collective).

    Slices of tensor-parallel ranks are gathered: a checkpoint holds whole tensors.
    """
    collected: dict[str, Held] = {}
    stacked: dict[str, dict[int, Tensor]] = defaultdict(dict)
    sharing: dict[str, Sharing] = {}
    for part in model.router_states():
        if part.saved_here:
            collected[f"model/{part.name}"] = Held(_copied(part.value), None, part.sharing)
    written = by_parameter(part for part in model.own_parts() if part.gathered_here)

    def put(prefix: str, parameter: Tensor, values: Tensor) -> None:
        for part in written.get(parameter, ()):
            key, value = f"{prefix}/{part.name}", part.gathered(values)
            if not part.saved_here:
                continue
            sharing[key] = part.sharing
            if part.index is None:
                collected[key] = Held(_copied(value), None, part.sharing)
            else:
                stacked[key][part.index] = _copied(value)

    for parameter in written:
        put("model", parameter, parameter)
    for moment in engine.moment_names:
        for parameter, value in engine.moments.whole(moment):
            put(f"optimizer/{moment}", parameter, value)
    for name, state in random_state().items():
        collected[f"rng/{dist.get_rank()}/{name}"] = Held(state)
    for key, rows in stacked.items():
        first = min(rows)
        values = torch.stack([rows[number] for number in range(first, first + len(rows))])
        collected[key] = Held(values, first, sharing[key])
    return collected


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write_part(folder: Path, rank: int, tensors: dict[str, Held]) -> dict[str, Any]:
    """Write a rank's part; return its file's size and hash, and the description of its tensors."""
    path = folder / f"part-{rank:05d}.safetensors"
    save_tensors({name: held.values for name, held in tensors.items()}, path)
    described = {}
    for name, held in tensors.items():
        rows = None if held.first is None else len(held.values)
        described[name] = describe_part(held.values, Part(path.name, held.first, rows), held.sharing)
    return {"files": {path.name: file_facts(path)}, "tensors": described}


def publish_checkpoint(aside: Path, final: Path, index: bytes, check: Callable[[], None] = lambda: None) -> None:
    """Complete a directory of parts with its index and make it visible under its final name, all of it on disk.

    Args:
        check: raises if this process may not publish any more; called at the last moment.
    """
    complete(aside, index)
    replaced = aside.with_suffix(_REPLACED)
    check()
    if final.exists():  # a step that is trained again after a resume from an older checkpoint
        final.replace(replaced)
    try:
        aside.replace(final)
    except OSError:  # another run has swept it away
        if replaced.exists():
            replaced.replace(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    write_text(final.parent / LATEST, final.name)
    fsync(final.parent)


def sweep_checkpoints(folder: Path) -> None:
    """Remove what a run that was killed left half written or half removed. Only the owner of the run may call it.

    A checkpoint that was about to be replaced comes back if its successor did not take its place.
    """
    for path in folder.glob(".step-*"):
        final = folder / path.name[1:].partition(".")[0]
        if path.suffix == _REPLACED and not final.exists():
            path.rename(final)
        else:
            # Renamed first: an owner that was taken for gone may be about to publish it, half removed.
            swept = path.with_suffix(_GONE)
            path.replace(swept)
            shutil.rmtree(swept)


def prune(run: Path, keep: int) -> None:
    """Remove old checkpoints of a run: all but the ``keep`` newest, the latest and the best on the validation split."""
    validated = validated_checkpoints(run)
    kept = {newest_checkpoint(run), *([best_of(validated)] if validated else [])}
    for old in checkpoints_of(run)[keep:]:
        if old not in kept:
            gone = old.with_name(f".{old.name}{_GONE}")
            old.replace(gone)  # a checkpoint under its own name is whole, also while it is removed
            shutil.rmtree(gone)
