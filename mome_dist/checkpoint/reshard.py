"""Rewriting a checkpoint for another layout or format, in one process and with the memory of a few buffers.

Tensors are streamed from the source's files to the target's, in the target's order. The content hash (`hashes`) is
computed from what was written and must be the source's; only then does the target appear under its name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mome_dist.checkpoint.adapter import is_adapter
from mome_dist.checkpoint.deepspeed.plan import Plan
from mome_dist.checkpoint.deepspeed.read import is_deepspeed, open_deepspeed
from mome_dist.checkpoint.deepspeed.write import Schedule, check_target, write_deepspeed
from mome_dist.checkpoint.format import CONFIG, complete, file_facts, find_checkpoint, index_of, merge_parts
from mome_dist.checkpoint.hashes import CONTENT, content_hash, joined
from mome_dist.checkpoint.parts import parts_of, write_part
from mome_dist.checkpoint.source import Source, item_size, open_canonical
from mome_dist.config import RunConfig
from mome_dist.config.derived import check_llm_terms
from mome_dist.config.load import config_of
from mome_dist.engine.deepspeed_names import ModelTensors
from mome_dist.engine.optimizer import moment_names
from mome_dist.errors import UserError
from mome_dist.files import fsync, published_directory
from mome_dist.hub import directory_of
from mome_dist.llm.division import check_division
from mome_dist.llm.shape import LLMShape
from mome_dist.parallel.layout import Layout

_HASHING_THREADS = 2


@dataclass(frozen=True)
class Outcome:
    """What was done.

    Attributes:
        source_content, target_content: content hashes; equal, or nothing would have been written.
        read, written: bytes of the source's tensors and of the target's files.
        seconds: of wall clock.
        notes: what the source does not hold, or could not be checked.
        experts: routed ones of a layer; zero in a run without.
    """

    source_content: str
    target_content: str
    read: int
    written: int
    seconds: float
    notes: list[str]
    experts: int


def reshard(
    source: Path,
    target: Path,
    format: str,
    layout: Layout,
    zero: int,
    config: Path | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Write ``target``, which must not exist, from ``source``.

    Args:
        source: a layout-free checkpoint, a run, or a DeepSpeed checkpoint (a directory with ``latest``, or of one tag).
        format: "canonical" or "deepspeed".
        layout: of the ranks that the target is for.
        zero: ZeRO stage that the target is for, 0 to 2.
        config: of the run, for a source that an engine saved itself.
        advance: told the bytes written so far, and how many there will be, roughly.

    Raises:
        UserError: naming the missing or damaged file, or what does not fit. The target does not exist then.
    """
    began = time.monotonic()
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; name a directory that does not, or remove it.")
    if is_adapter(source):
        raise UserError(f"{source} is an export: it holds weights and no optimiser. Name the run that it was made of.")
    with open_checkpoint(source, config) as (opened, notes):
        model, run = _model(opened), config_of(opened.config, source / CONFIG)
        notes += _check_layout(layout, model, run)
        expected = opened.content or content_hash(hashed(opened))
        total, done = sum(facts.count * item_size(facts.dtype) for facts in opened.facts.values()), 0

        def count(written: int) -> None:
            nonlocal done
            done += written
            advance(done, max(total, done))

        # A thread flushes each file while the next one is written; `published_directory` sees that all are on disk.
        with _writing(target), published_directory(target, replace=False) as built, ThreadPoolExecutor(1) as flushing:

            def finished(path: Path, written: int) -> None:
                flushing.submit(fsync, path)
                count(written)

            if format == "canonical":
                tensors = _write_canonical(built, opened, layout, zero, model, count, finished)
            else:
                plan = _plan(opened, layout, zero, model, run)
                total = sum(4 * p.count for file in plan.files() for t in file.tensors.values() for p in t.pieces)
                schedule = Schedule(opened.record["step"], run.training.steps, run.optimizer)
                write_deepspeed(built, f"global_step{plan.steps}", plan, opened, schedule, finished)
                with open_deepspeed(built)[0] as written:
                    tensors = hashed(written)
            content = content_hash(tensors)
            for name, claimed in opened.hashes.items():
                if tensors[name]["sha256"] != claimed:
                    raise UserError(f"{source}: {name} does not have the hash in the index; use an older checkpoint.")
            if content != expected:
                raise UserError(f"{source}: its tensors do not have the content hash that it names; use an older one.")
        read = sum(facts.count * item_size(facts.dtype) for facts in opened.facts.values())
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Outcome(expected, content, read, size, time.monotonic() - began, notes, model.routed_experts)


@contextmanager
def open_checkpoint(path: Path, config: Path | None) -> Iterator[tuple[Source, list[str]]]:
    """A checkpoint of either format, and what is to be said about it.

    Raises:
        UserError: if it is none, is damaged, or lacks the configuration and none is given.
    """
    if not is_deepspeed(path):
        with open_canonical(find_checkpoint(path)) as source:
            yield source, []
        return
    source, plan = open_deepspeed(path)
    with source:
        if source.config is not None:
            yield source, []
            return
        if config is None:
            raise UserError(
                f"{path} was saved by an engine itself and does not hold the run's configuration: name the run's "
                f"{CONFIG} with --config."
            )
        source.config = config.read_text(encoding="utf-8")
        run = config_of(source.config, config)
        if plan.moments != moment_names(run.optimizer):
            raise UserError(
                f"{path} holds {list(plan.moments)} of the optimiser, {config} has optimizer.name={run.optimizer.name}."
            )
        source.record |= {
            "optimizer": run.optimizer.name,
            "data": {"order": {}, "utterances_seen": plan.steps * run.data.batch_size if run.data.batch_size else None},
            "written_by": {"layout": asdict(plan.layout), "zero": plan.zero},
            "versions": {},
            "frozen": {},
        }
        yield (
            source,
            [
                "the source does not say which frozen models and which order of utterances it was trained with: a run "
                "that continues cannot check them",
                f"the source counts optimiser steps only: training continues after step {plan.steps}",
                "the source holds no random-number generators",
            ],
        )


def hashed(source: Source) -> dict[str, dict[str, Any]]:
    """Shape, type and hash of every tensor, as an index has them."""
    names = list(source.facts)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        found = dict(zip(names, pool.map(source.digests, names), strict=True))
    return {
        name: {
            "shape": list(source.facts[name].shape),
            "dtype": source.facts[name].dtype,
            "sha256": joined(digests) if source.facts[name].stacked else digests[0],
        }
        for name, digests in found.items()
    }


def _model(source: Source) -> ModelTensors:
    found = {name.removeprefix("model/"): f for name, f in source.facts.items() if name.startswith("model/")}
    sharing = {name: facts.sharing for name, facts in found.items() if facts.sharing is not None}
    return ModelTensors({name: facts.shape for name, facts in found.items()}, sharing, source.record.get("layers"))


def _check_layout(layout: Layout, model: ModelTensors, run: RunConfig) -> list[str]:
    layout.check_division(model.layers, model.routed_experts)
    for name, sharing in model.sharing.items():
        sharing.local_shape(model.shapes[name], layout.tp)
    llm = directory_of(run.llm.path)
    if not llm.is_dir():
        return [f"llm.path={run.llm.path} is not here: tp={layout.tp} was not checked against it"]
    shape = LLMShape.from_directory(llm)
    check_division(shape, layout, model.routed_experts, run.llm.pad_heads)
    check_llm_terms(run, layout, shape)
    return []


def _plan(source: Source, layout: Layout, zero: int, model: ModelTensors, run: RunConfig) -> Plan:
    check_target(layout)
    if not run.projector.trainable:
        raise UserError(
            "the run kept its projectors frozen (projector.trainable=false): its engine does not hold them, and nor "
            "would a DeepSpeed checkpoint. Use --format canonical."
        )
    other = sorted({f.dtype for name, f in source.facts.items() if name.startswith(CONTENT)} - {"float32"})
    if other:
        raise UserError(f"the checkpoint holds {', '.join(other)} tensors; the engine's are float32.")
    stages = [layout.layers_of(pp, model.layers) for pp in range(layout.pp)]
    return Plan(model, layout, stages, zero, moment_names(run.optimizer), source.record["optimizer_steps"])


def _write_canonical(
    folder: Path,
    source: Source,
    layout: Layout,
    zero: int,
    model: ModelTensors,
    advance: Callable[[int], None],
    finished: Callable[[Path, int], None],
) -> dict[str, Any]:
    files: dict[str, Any] = {}
    described = []
    for rank, rows in parts_of(source.facts, layout, model.layers):
        path = folder / f"part-{rank:05d}.safetensors"
        files[path.name], tensors = write_part(path, rows, source, advance)
        described.append(tensors)
        finished(path, 0)
    (folder / CONFIG).write_text(str(source.config), encoding="utf-8")
    files[CONFIG] = file_facts(folder / CONFIG)
    # Generators belong to the ranks that trained, so `written_by` stays.
    record = source.record | {"resharded": {"layout": asdict(layout), "zero": zero}}
    merged = merge_parts(described)
    complete(folder, index_of(record, files, merged))
    return merged


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{target} could not be written ({error}); nothing of it is left.") from error
