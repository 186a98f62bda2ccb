"""Loading a checkpoint into a distributed model, at any layout: each rank reads the slices it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from mome_dist.checkpoint.format import CheckpointReader, newest_whole_checkpoint
from mome_dist.errors import UserError
from mome_dist.parallel.model import DistributedMoME
from mome_dist.training.engine import Engine


def check_frozen(directory: Path, frozen: Mapping[str, str]) -> None:
    """Refuse a checkpoint that was trained on other frozen models.

    Raises:
        UserError: naming the model that differs.
    """
    with CheckpointReader(directory) as reader:
        for name, fingerprint in reader.index["frozen"].items():
            if frozen.get(name, fingerprint) != fingerprint:
                raise UserError(f"{directory} was trained with another {name}: set {name}.path to the one it was.")


def checkpoint_to_resume(run: Path, console: Console) -> Path | None:
    """The checkpoint that a run continues from, the same on all ranks; rank 0 looks, and hashes what it finds.

    Raises:
        UserError: on all ranks, if every checkpoint is damaged.
    """
    found: list[str | None] = [None, None]  # the path, or what is wrong
    if dist.get_rank() == 0:
        try:
            newest = newest_whole_checkpoint(run, lambda line: console.print(f"[bold red]{line}[/]", highlight=False))
            found[0] = None if newest is None else str(newest)
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    path, problem = found
    if problem is not None:
        raise UserError(problem)
    return None if path is None else Path(path)


@torch.no_grad()
def restore_weights(directory: Path, model: DistributedMoME) -> int:
    """Fill the trainable parameters and router biases; call it before the engine is made. Returns the steps done."""
    with CheckpointReader(directory) as reader:
        _restore_biases(reader, model)
        for name, parameter in model.named_trainables():
            value = reader.read(f"model/{name.name}", name.index)
            if value.shape != parameter.shape:
                raise UserError(
                    f"{directory}: {name.name} has shape {list(value.shape)}, configured is {list(parameter.shape)}: "
                    "resume with the configuration that wrote it, or set training.resume=false."
                )
            parameter.copy_(value)
        return reader.step


def _restore_biases(reader: CheckpointReader, model: DistributedMoME) -> None:
    biases = model.router_biases()
    saved = any(name.endswith(".router_bias") for name in reader.names("model/"))
    if model.momes and saved != bool(biases):
        raise UserError(
            f"{reader.directory} was trained {'with' if saved else 'without'} a router bias: set mome.bias_rate "
            f"{'above 0' if saved else 'to 0'}, or training.resume=false to start anew."
        )
    for name, bias in biases.items():
        bias.copy_(reader.read(f"model/{name}"))


def restore_optimizer(directory: Path, model: DistributedMoME, engine: Engine) -> None:
    """Fill the optimiser's moments; call it after the engine is made."""
    with CheckpointReader(directory) as reader:
        if not reader.names("optimizer/") and engine.moment_names:
            raise UserError(f"{directory} was written by another optimiser: set training.resume=false to start anew.")
        moments = {
            key: [reader.read(f"optimizer/{key}/{name.name}", name.index) for name, _ in model.named_trainables()]
            for key in engine.moment_names
        }
        engine.set_moments([parameter for _, parameter in model.named_trainables()], moments, reader.step)
