"""What the tests of resharding run inside forked worlds: a small model that trains, saves and loads at any layout."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from mome_dist.checkpoint.deepspeed.write import CLIENT_KEY
from mome_dist.checkpoint.format import INDEX, SEAL, CheckpointReader, seal_of
from mome_dist.checkpoint.save import CheckpointSaver
from mome_dist.engine.engine import Engine
from mome_dist.engine.optimizer import learning_rate
from mome_dist.model.build import build_distributed
from mome_dist.model.distributed import DistributedMoME
from mome_dist.parallel.device import current_device
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Coordinates, Layout
from mome_dist.parallel.parts import by_parameter
from mome_dist.speech.lora import QUERY_AND_VALUE, LoRATerms, attach_lora
from mome_dist.training.balance import update_routers
from mome_dist.training.run_directory import owned_run
from mome_dist.training.step import forward_backward
from mome_dist.verification.probe import Probe, wake

STEPS = 2  # before the checkpoint
TAG = "saved"


def _build(probe: Probe, layout: Layout, zero: int) -> tuple[DistributedMoME, Engine]:
    settings = {"zero_optimization": {"stage": zero}}
    lora = _lora() if parallel_state.is_pipeline_first_stage() else None
    model = build_distributed(probe.config, layout, probe.widths, "alltoall", current_device(), lora=lora).train()
    wake(model.trained_parts(), probe.config.seed)
    return model, Engine(model, probe.config.optimizer, settings, layout.sequence_parallel)


def _lora() -> LoRATerms | None:
    """Terms of an encoder that encodes nothing; its layers have numbers of one and of two digits."""
    encoder = nn.Sequential(*(nn.ModuleDict({name: nn.Linear(6, 5) for name in QUERY_AND_VALUE}) for _ in range(11)))
    attach_lora(encoder, rank=2, alpha=4)
    return LoRATerms.of({"video": encoder})


def _step(probe: Probe, layout: Layout, at: Coordinates, model: DistributedMoME, engine: Engine, number: int) -> float:
    step = probe.step(number, at.dp, layout)
    with engine.accumulate():
        loss = forward_backward(model, step).loss
        for term in model.lora.parameters() if model.lora is not None else ():
            term.grad = term.detach() + 1
    engine.step(learning_rate(probe.config.optimizer, number, probe.config.training.steps))
    update_routers(model)
    return loss


def train_and_save(probe: Probe, layout: Layout, zero: int, folder: Path) -> list[float]:
    """Train `STEPS` steps, save ``folder/checkpoints`` and, by the engine itself, ``folder/native``; train two more.

    Returns:
        The losses of the steps after the save.
    """
    probe = Probe(dataclasses.replace(probe.config, output_dir=str(folder)), probe.steps)
    with parallel_world(layout, probe.config.seed, 60) as at, owned_run(probe.config) as ownership:
        model, engine = _build(probe, layout, zero)
        for number in range(STEPS):
            _step(probe, layout, at, model, engine, number)
        order = {"seed": probe.config.seed}
        saver = CheckpointSaver(probe.config, layout, {"llm": "0" * 64}, order, lambda step: step, ownership)
        saver.save(STEPS, model, engine)
        engine.deepspeed.save_checkpoint(str(folder / "native"), tag=TAG)
        return [_step(probe, layout, at, model, engine, STEPS + more) for more in range(2)]


@dataclass(frozen=True)
class Loaded:
    """What a rank found in a DeepSpeed checkpoint.

    Attributes:
        different: what is not as in the layout-free checkpoint.
        losses: of the two steps that it trained from there.
        client: the client state.
    """

    different: list[str]
    losses: list[float]
    client: dict[str, Any]


def load_and_train(probe: Probe, layout: Layout, zero: int, native: Path, canonical: Path, scratch: Path) -> Loaded:
    """Load a DeepSpeed checkpoint with the engine's own `load_checkpoint`, save it again to ``scratch/native`` with the
    engine's own `save_checkpoint`, and train two steps."""
    with parallel_world(layout, probe.config.seed, 60) as at:
        model, engine = _build(probe, layout, zero)
        path, client = engine.deepspeed.load_checkpoint(str(native))
        assert path is not None
        different = _differences(model, engine, canonical)
        engine.deepspeed.save_checkpoint(str(scratch / "native"), tag=TAG)
        losses = [_step(probe, layout, at, model, engine, STEPS + more) for more in range(2)]
        return Loaded(different, losses, client["mome_dist"])


def _differences(model: DistributedMoME, engine: Engine, canonical: Path) -> list[str]:
    found = []
    with CheckpointReader(canonical) as reader:
        parts = by_parameter(model.trained_parts())

        def compare(prefix: str, parameter: torch.Tensor, values: torch.Tensor) -> None:
            for part in parts.get(parameter, ()):  # the idle module stands for no part of the model
                saved = part.here(reader.read(f"{prefix}/{part.name}", part.index))
                if not torch.equal(part.of(values.detach()), saved):
                    found.append(f"{prefix}/{part.label}")

        for held in engine.parameters():
            compare("model", held, held)
        for moment in engine.moment_names:
            for parameter, value in engine.moments.whole(moment):
                compare(f"optimizer/{moment}", parameter, value)
        for bias in model.router_states():
            if not torch.equal(bias.value, reader.read(f"model/{bias.name}")):
                found.append(bias.name)
        zero = engine.deepspeed.optimizer
        torch_optimizer = zero.optimizer if engine.zero_stage else zero
        if engine.zero_stage:  # what the optimiser steps on
            for part, flat in zip(
                zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True
            ):
                if not any(torch.equal(part, other) for other in flat):
                    found.append("a partition of the fp32 weights")
        steps = {float(state["step"]) for state in torch_optimizer.state.values()}
        if steps - {float(reader.index["optimizer_steps"])}:
            found.append(f"step {steps}")
    return found


def forget_sharing(checkpoint: Path) -> None:
    """Make a checkpoint one of before there were descriptions."""
    index = json.loads((checkpoint / INDEX).read_text())
    del index["layers"]
    for entry in index["tensors"].values():
        entry.pop("sharing", None)
    (checkpoint / INDEX).write_bytes(content := json.dumps(index).encode())
    (checkpoint / SEAL).write_bytes(seal_of(content))


def tree_differences(mine: Any, theirs: Any, place: str = "") -> list[str]:
    """Where the contents of two ``.pt`` files differ, tensors and all else, but for this project's client state."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = (mine.keys() | theirs.keys()) - {CLIENT_KEY}
        missing = [f"{place}/{key} is in one only" for key in keys if key not in mine or key not in theirs]
        both = [key for key in keys if key in mine and key in theirs]
        return missing + [d for key in both for d in tree_differences(mine[key], theirs[key], f"{place}/{key}")]
    if isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(mine) == len(theirs):
        pairs = enumerate(zip(mine, theirs, strict=True))
        return [d for number, pair in pairs for d in tree_differences(*pair, f"{place}/{number}")]
    if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        same = mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs)
    elif type(mine).__module__.startswith("deepspeed"):
        same = type(mine) is type(theirs) and vars(mine) == vars(theirs)
    else:
        same = mine == theirs
    return [] if same else [place]
