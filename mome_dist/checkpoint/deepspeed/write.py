"""Writing a DeepSpeed checkpoint of any layout from layout-free tensors, file by file, in one process."""

from __future__ import annotations

import base64
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mome_dist.checkpoint.deepspeed.plan import Plan, PlannedFile, Stored
from mome_dist.checkpoint.deepspeed.torch_file import write_torch_file
from mome_dist.checkpoint.deepspeed.zero import fragments, partition
from mome_dist.checkpoint.pieces import Constant, Piece, Range
from mome_dist.checkpoint.source import Source
from mome_dist.config.schema import OptimizerConfig
from mome_dist.engine.deepspeed_names import optimizer_groups, walked_name
from mome_dist.engine.optimizer import deepspeed_settings, learning_rate, make_optimizer
from mome_dist.errors import UserError
from mome_dist.parallel.layout import Layout
from mome_dist.versions import version_of

CLIENT_KEY = "mome_dist"  # of what DeepSpeed calls the client state
MOST_MODEL_PARALLEL_RANKS = 100
_CONSTANT_CHUNK = 1 << 18  # elements


@dataclass(frozen=True)
class Schedule:
    """What the learning rate in a checkpoint follows from.

    Attributes:
        step: training steps done, skipped ones included.
        steps: that the run will have.
        optimizer: of the run.
    """

    step: int
    steps: int
    optimizer: OptimizerConfig


def check_target(layout: Layout) -> None:
    """Refuse what DeepSpeed itself cannot load.

    Raises:
        UserError: for more than 100 model-parallel ranks.
    """
    if layout.tp * layout.pp > MOST_MODEL_PARALLEL_RANKS:
        raise UserError(
            f"tp {layout.tp} x pp {layout.pp} is more than {MOST_MODEL_PARALLEL_RANKS} model-parallel ranks: DeepSpeed "
            "sorts the names of their files as text and gives rank 11 the file of rank 100. Use the canonical format."
        )


def write_deepspeed(
    folder: Path, tag: str, plan: Plan, source: Source, schedule: Schedule, finished: Callable[[Path, int], None]
) -> None:
    """Fill ``folder`` with ``TAG/...`` and ``latest``.

    Args:
        finished: told of each file written, and its bytes.
    """
    check_target(plan.layout)

    def read(piece: Piece) -> Iterator[memoryview]:
        return _constant(piece) if isinstance(piece, Constant) else source.chunks(piece)

    (folder / tag).mkdir(parents=True)
    for planned in plan.files():
        path = folder / tag / planned.name
        content = _content(planned, plan, schedule)
        if planned.kind == "model":
            content[CLIENT_KEY] = _client_state(source, with_generators=planned.pp == planned.tp == 0)
        written = write_torch_file(path, content, read)
        finished(path, written)
    (folder / "latest").write_text(tag)


def _client_state(source: Source, with_generators: bool) -> dict[str, Any]:
    """What `load_checkpoint` gives back to each rank: plain values, the states of all ranks' generators in one file."""
    generators = {name: facts for name, facts in source.facts.items() if name.startswith("rng/") and with_generators}
    return {
        "record": source.record,
        "config": source.config,
        "content": source.content,
        "sharing": {
            name.removeprefix("model/"): facts.sharing.as_json()
            for name, facts in source.facts.items()
            if name.startswith("model/") and facts.sharing is not None
        },
        "rng": {
            name: {
                "shape": list(facts.shape),
                "dtype": facts.dtype,
                "base64": base64.b64encode(b"".join(source.chunks(Range(name, 0, facts.count)))).decode(),
            }
            for name, facts in generators.items()
        },
    }


def _constant(piece: Constant) -> Iterator[memoryview]:
    once = struct.pack(f"<{len(piece.values)}f", *piece.values)
    left = piece.times
    repeats = max(1, _CONSTANT_CHUNK // len(piece.values))
    while left:
        yield memoryview(once * min(left, repeats))
        left -= min(left, repeats)


def _content(planned: PlannedFile, plan: Plan, schedule: Schedule) -> dict[Any, Any]:
    """What the file holds, in the order and nesting that DeepSpeed writes."""
    if planned.kind == "model":
        content = _model_state(planned, plan, schedule)
    elif planned.kind == "zero":
        content = _zero_state(planned, plan, schedule)
    elif planned.kind == "optimizer":
        content = {"optimizer": _torch_state(planned, plan, schedule, flat=False)}
    else:
        content = {}
    for place, stored in planned.tensors.items():
        *folders, last = place
        holder: Any = content
        for key in folders:
            holder = holder.setdefault(key, {}) if isinstance(holder, dict) else holder[key]
        holder[last] = stored
    return content


def _settings(plan: Plan, schedule: Schedule) -> dict[str, Any]:
    return deepspeed_settings({"zero_optimization": {"stage": plan.zero}}, schedule.optimizer)


def _model_state(planned: PlannedFile, plan: Plan, schedule: Schedule) -> dict[str, Any]:
    layout, zero = plan.layout, plan.zero
    groups = optimizer_groups(planned.parameters)
    shapes = [OrderedDict((parameter.local, parameter.shape) for parameter in group) for group in groups]
    experts = [layout.ep if number is None else plan.model.routed_experts for number in plan.modules(planned.pp)]
    return {
        "module": OrderedDict(),
        "buffer_names": [walked_name(buffer.local) for buffer in plan.buffers(planned.pp)],
        "optimizer": None if zero else _torch_state(planned, plan, schedule, flat=False),
        "param_shapes": shapes if zero else None,
        "frozen_param_shapes": OrderedDict() if zero == 2 else None,
        "shared_params": {} if zero else None,
        "frozen_param_fragments": OrderedDict() if zero == 2 else None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,  # such steps do not reach the engine
        "global_steps": plan.steps,
        "global_samples": plan.steps * layout.dp,  # of one sample a rank and step, as the engine is told
        "dp_world_size": layout.dp,
        "mp_world_size": layout.tp * layout.pp,
        "checkpoint_parallel_dimensions": {"pp_degree": layout.pp, "tp_degree": layout.tp},
        "ds_config": _settings(plan, schedule),
        "ds_version": version_of("deepspeed"),
        **({"num_experts": experts, "ds_autoep_layers": None} if experts else {}),
    }


def _torch_state(planned: PlannedFile, plan: Plan, schedule: Schedule, flat: bool) -> dict[str, Any]:
    """The state of torch's optimiser: over one flat parameter a group, or over all parameters."""
    described = [
        {"name": "shared"} if number == 0 else {"name": f"ep_size_{plan.layout.ep}", "moe": True}
        for number in range(len(optimizer_groups(planned.parameters)))
    ]
    groups: list[dict[str, Any]] = [
        {"params": [torch.empty(0) for _ in group[: 1 if flat else None]]} | description
        for group, description in zip(optimizer_groups(planned.parameters), described, strict=True)
    ]
    state = make_optimizer(groups, schedule.optimizer).state_dict()
    for group in state["param_groups"]:
        group["lr"] = learning_rate(schedule.optimizer, max(0, schedule.step - 1), schedule.steps)
    return state


def _zero_state(planned: PlannedFile, plan: Plan, schedule: Schedule) -> dict[str, Any]:
    # Classes of DeepSpeed that its own files refer to; importing them takes seconds.
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    groups = optimizer_groups(planned.parameters)
    parts = [
        partition(sum(p.count for p in group), plan.group_ranks(number), plan.group_rank(number, planned.part))
        for number, group in enumerate(groups)
    ]
    mappings = [
        OrderedDict(
            (group[piece.number].local, fragment_address(numel=piece.stop - piece.start, start=piece.offset))
            for piece in fragments([parameter.count for parameter in group], part)
        )
        for group, part in zip(groups, parts, strict=True)
    ]
    weights: list[Stored | None] = [None] * len(groups)
    return {
        "optimizer_state_dict": {
            "loss_scaler": LossScaler(scale=1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
            "clip_grad": schedule.optimizer.gradient_clipping,
            "base_optimizer_state": _torch_state(planned, plan, schedule, flat=True),
            "single_partition_of_fp32_groups": weights,
            "zero_stage": ZeroStageEnum(plan.zero),
            "group_paddings": [part.padding for part in parts],
            "param_alignment_paddings": [[0] * len(group) for group in groups],
            "partition_count": [plan.group_ranks(number) for number in range(len(groups))],
            "ds_version": version_of("deepspeed"),
            "param_slice_mappings": mappings,
        },
        "ds_config": _settings(plan, schedule),
        "ds_version": version_of("deepspeed"),
    }
