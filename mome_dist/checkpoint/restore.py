"""Loading a checkpoint into a distributed model, at any layout: each rank reads the slices it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mome_dist.checkpoint.format import CONFIG, CheckpointReader, checkpoints_of, sharing_of
from mome_dist.checkpoint.random_state import set_random_state
from mome_dist.config.derived import lora_of
from mome_dist.config.load import load_saved_config
from mome_dist.config.schema import LLMLoRAConfig, LoRAConfig, RunConfig
from mome_dist.engine.engine import Engine
from mome_dist.errors import UserError
from mome_dist.model.distributed import DistributedMoME
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.whereabouts import wait_for_all

ANEW = "or start anew with training.resume=false"


def checkpoint_to_resume(run: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run whose every file has the hash that its index names, the same on all ranks.

    The ranks share the hashing.

    Args:
        report: told, on all ranks, of each damaged checkpoint that is passed over.

    Raises:
        UserError: on all ranks, if there are checkpoints and all are damaged.
    """
    named: list[list[str]] = [[path.name for path in checkpoints_of(run)]]
    dist.broadcast_object_list(named, src=0)
    for name in named[0]:
        path = run / "checkpoints" / name
        problems: list[str | None] = [None] * dist.get_world_size()
        damage = _damage(path)
        wait_for_all("checking a checkpoint")
        dist.all_gather_object(problems, damage)
        found = next((problem for problem in problems if problem is not None), None)
        if found is None:
            return path
        report(f"{name} is damaged and passed over: {found}")
    if named[0]:
        raise UserError(f"{run}/checkpoints: {', '.join(named[0])} are all damaged. Restore one from a copy, {ANEW}.")
    return None


def _damage(directory: Path) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        with CheckpointReader(directory) as reader:
            reader.verify(sorted(reader.index["files"])[dist.get_rank() :: dist.get_world_size()])
    except UserError as error:
        return str(error)
    return None


def check_frozen(directory: Path, frozen: Mapping[str, str]) -> None:
    """Refuse a checkpoint that was trained on other frozen models than those of the given fingerprints, by name.

    Raises:
        UserError: naming the model that differs.
    """
    with CheckpointReader(directory) as reader:
        for name, fingerprint in reader.index["frozen"].items():
            if frozen.get(name, fingerprint) != fingerprint:
                raise UserError(f"{directory} was trained with another {name}: set {name}.path to the one it was.")


def check_continues(directory: Path, frozen: Mapping[str, str], order: Mapping[str, Any], optimizer: str) -> None:
    """Refuse a checkpoint that this run would not continue, but turn into something else.

    Args:
        frozen: fingerprints of the frozen models, by name.
        order: what the order of utterances is a function of, by configuration key.
        optimizer: its name.

    Raises:
        UserError: naming what differs.
    """
    check_frozen(directory, frozen)
    with CheckpointReader(directory) as reader:
        saved = reader.index["data"]["order"]  # empty where it is not known; None where a key is newer than it
        for key in {**saved, **order} if saved else ():
            if order.get(key) != saved.get(key):
                raise UserError(
                    f"{directory} was trained with {key}={saved.get(key)}, now it is {order.get(key)}: utterances "
                    f"would be lost or repeated. Set it back, {ANEW}."
                )
        if reader.index["optimizer"] != optimizer:
            raise UserError(
                f"{directory} was trained with optimizer.name={reader.index['optimizer']}, now it is {optimizer}: set "
                f"it back, {ANEW}."
            )


def saved_config(directory: Path) -> RunConfig:
    """The configuration of the run that a checkpoint is of, from its file, whose hash is checked."""
    with CheckpointReader(directory) as reader:
        reader.verify([CONFIG])
    return load_saved_config(directory / CONFIG)


def check_lora(directory: Path, config: RunConfig, lora: Mapping[str, LoRAConfig], init: bool = False) -> list[str]:
    """Refuse a checkpoint whose encoders have other low-rank terms than configured.

    Args:
        config: that of the checkpoint, `saved_config`.
        lora: by stream, none of an encoder that stays as it is. Alpha is nowhere but in the configuration.
        init: whether a new run starts from the checkpoint's weights; then an encoder that was frozen may learn.

    Returns:
        The streams of such encoders.

    Raises:
        UserError: naming the configuration key.
    """
    saved, begin = lora_of(config), []
    for stream in ("audio", "video"):
        before, now = saved.get(stream), lora.get(stream)
        if init and before is None and now is not None:
            begin.append(stream)
        elif before != now:
            raise UserError(
                f"{directory} was trained with {stream}_encoder.lora={before or 'null'}, now it is {now or 'null'}: "
                f"set it back, {'or name another training.init_from' if init else ANEW}."
            )
    return begin


def check_llm_lora(directory: Path, config: RunConfig, lora: LLMLoRAConfig | None, init: bool = False) -> bool:
    """Refuse a checkpoint whose LLM has other low-rank terms than configured; their rank and views are those of its
    tensors.

    Args:
        config: that of the checkpoint, `saved_config`.
        lora: of the LLM; None if it has none.
        init: whether a new run starts from the checkpoint's weights; then an LLM without terms may get some.

    Returns:
        Whether it does.

    Raises:
        UserError: naming the configuration key.
    """
    before = config.llm.lora
    if init and before is None:
        return lora is not None
    saved, now = (None if each is None else (each.scale, sorted(each.terms)) for each in (before, lora))
    if saved != now:
        raise UserError(
            f"{directory} was trained with llm.lora={before or 'null'}, now it is {lora or 'null'}: set it back, "
            f"{'or name another training.init_from' if init else ANEW}."
        )
    return False


@torch.no_grad()
def restore_weights(directory: Path, model: DistributedMoME, without: Sequence[str] = ()) -> int:
    """Fill the run's own parameters and its routers' state; call it before the engine is made. Returns the steps done.

    Args:
        without: what the names of tensors begin with that the checkpoint has not; here they keep their initial values.
    """
    with CheckpointReader(directory) as reader:
        _restore_states(reader, model)
        _check_all_taken(reader, model)
        for part in model.own_parts():
            if part.name.startswith(tuple(without)):
                continue
            value = reader.read(f"model/{part.name}", part.index)
            if value.shape != part.whole_shape:
                raise UserError(
                    f"{directory}: {part.name} has shape {list(value.shape)}, configured is {list(part.whole_shape)}: "
                    f"resume with the configuration that wrote it, {ANEW}."
                )
            part.value.copy_(part.here(value))
        return reader.step


def _check_all_taken(reader: CheckpointReader, model: DistributedMoME) -> None:
    """Refuse a checkpoint with tensors that this rank should have, and has not: they would be lost without a word."""
    own = {part.name for part in (*model.own_parts(), *model.router_states())}
    layers = {layer.layer_number - 1 for chunk in model.parts() for layer in chunk.llm.decoder.layers}
    for name in reader.names("model/"):
        sharing = sharing_of(name, reader.index["tensors"][name])
        layer = None if sharing is None else sharing.layer
        belongs = model.projectors is not None if layer is None else layer in layers
        if belongs and name.removeprefix("model/") not in own:
            raise UserError(
                f"{reader.directory} holds {name.removeprefix('model/')}, which the configured model has not: resume "
                f"with the configuration that wrote it, {ANEW}."
            )


def _restore_states(reader: CheckpointReader, model: DistributedMoME) -> None:
    states = model.router_states()
    saved = any(name.endswith(".router_bias") for name in reader.names("model/"))
    if model.momes and saved != any(state.name.endswith(".router_bias") for state in states):
        raise UserError(
            f"{reader.directory} was trained {'with' if saved else 'without'} a router bias: set mome.bias_rate "
            f"{'above 0' if saved else 'to 0'}, {ANEW}."
        )
    for state in states:
        state.value.copy_(reader.read(f"model/{state.name}"))


def restore_optimizer(directory: Path, model: DistributedMoME, engine: Engine) -> None:
    """Fill the optimiser's moments, one tensor after the other; call it after the engine is made."""
    with CheckpointReader(directory) as reader:
        engine.resume(reader.index["optimizer_steps"])
        for moment in engine.moment_names:
            for part in model.trained_parts():
                value = reader.read(f"optimizer/{moment}/{part.name}", part.index)
                engine.moments.fill(part.parameter, part.start, moment, part.here(value))


def restore_random_state(directory: Path, layout: Layout) -> None:
    """Put back this rank's random-number generators, if the same layout wrote the checkpoint.

    Another layout goes on with its own: what training draws is a function of the seed and the step.
    """
    with CheckpointReader(directory) as reader:
        written_by = Layout(**reader.index["written_by"]["layout"])
        prefix = f"rng/{dist.get_rank()}/"
        names = reader.names(prefix)  # none, if it was made from files that do not hold generators
        if names and asdict(written_by) == asdict(layout):
            set_random_state({name.removeprefix(prefix): reader.read(name) for name in names})
