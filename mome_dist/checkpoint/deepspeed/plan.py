"""Which file of a DeepSpeed checkpoint holds which numbers, for any layout and ZeRO stage.

    TAG/mp_rank_MM_model_states.pt                     shared weights and buffers of a model-parallel rank
    TAG/layer_L_expert_E_mp_rank_MM_model_states.pt    an expert; L counts the MoE modules of the rank
    TAG/zero_pp_rank_D_mp_rank_MM_optim_states.pt      ZeRO 1 and 2: a data-parallel rank's partition of every group
    TAG/expp_rank_X_mp_rank_MM_optim_states.pt         ZeRO 0: the optimiser of an expert-parallel rank
    latest                                             the tag

A model-parallel rank is ``pp_rank * tp + tp_rank``. Tensor-parallel ranks hold equal copies of what is not sliced over
them (`mome_dist.sharing`). In a run without experts there are no files of them, and without ZeRO the optimiser is in
the model-parallel rank's file alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mome_dist.checkpoint.deepspeed.zero import fragments, partition
from mome_dist.checkpoint.pieces import Constant, Piece, Range
from mome_dist.engine.deepspeed_names import (
    EXPERTS,
    IDLE,
    ModelTensors,
    Parameter,
    StateTensor,
    engine_parameters,
    idle_module,
    optimizer_groups,
)
from mome_dist.moe.experts import initial_value
from mome_dist.moe.forms.registry import DEFAULT, find_form
from mome_dist.moe.routers.base import initial_map
from mome_dist.parallel.layout import Layout

# Where a tensor lies in the nested dictionaries of a file.
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of a file (fp32): its shape and, one after the other, where its numbers come from."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class PlannedFile:
    """A file of a checkpoint.

    Attributes:
        name: in the tag's directory.
        kind: "model", "expert", "zero" or "optimizer".
        pp, tp: the model-parallel rank that it belongs to.
        part: the data-parallel rank (of a "zero" file) or the expert-parallel one (of an "optimizer" file).
        parameters: of the engine that writes it; empty for an "expert" file.
        tensors: by their place in the file.
    """

    name: str
    kind: str
    pp: int
    tp: int
    part: int
    parameters: list[Parameter]
    tensors: dict[Path, Stored]


@dataclass(frozen=True)
class Plan:
    """The files of a layout.

    Attributes:
        model: shapes of the layout-free model.
        layout: sizes of the axes.
        stages: numbers of each pipeline rank's layers, in its order (`Layout.layers_of`).
        zero: ZeRO stage, 0 to 2.
        moments: names of the optimiser's running averages.
        steps: that the optimiser counted.
    """

    model: ModelTensors
    layout: Layout
    stages: list[list[int]]
    zero: int
    moments: tuple[str, ...]
    steps: int

    def files(self) -> Iterator[PlannedFile]:
        """All files, model-parallel rank by rank."""
        layout = self.layout
        for pp in range(layout.pp):
            for tp in range(layout.tp):
                by_expert_rank = [
                    engine_parameters(self.model, self.stages[pp], layout.ep, rank, pp == 0, layout.tp, tp)
                    for rank in range(layout.ep)
                ]
                rank = f"mp_rank_{pp * layout.tp + tp:02d}"
                name = f"{rank}_model_states.pt"
                yield PlannedFile(
                    name, "model", pp, tp, 0, by_expert_rank[0], self._model_tensors(pp, by_expert_rank[0])
                )
                yield from self._experts(pp, tp, rank)
                ranks = layout.dp if self.zero else layout.ep if self.model.routed_experts else 0
                for part in range(ranks):
                    parameters = by_expert_rank[part % layout.ep]
                    if self.zero:
                        name, kind = f"zero_pp_rank_{part}_{rank}_optim_states.pt", "zero"
                        tensors = self._partitions(optimizer_groups(parameters), part)
                    else:
                        name, kind = f"expp_rank_{part}_{rank}_optim_states.pt", "optimizer"
                        tensors = self._whole_moments(optimizer_groups(parameters))
                    yield PlannedFile(name, kind, pp, tp, part, parameters, tensors)

    def modules(self, pp: int) -> list[int | None]:
        """The MoE modules of a pipeline rank by their layers' numbers; None is the idle one."""
        return (list(self.stages[pp]) or [None]) if self.model.routed_experts else []

    def buffers(self, pp: int) -> list[StateTensor]:
        """What the routers of a pipeline rank have that no gradient trains."""
        return [state for number in self.stages[pp] for state in self.model.router_states(number)]

    def group_ranks(self, group: int) -> int:
        """Over how many ranks an optimiser group is partitioned."""
        return self.layout.dp if group == 0 else self.layout.dp // self.layout.ep

    def group_rank(self, group: int, dp_rank: int) -> int:
        """Which of those a data-parallel rank is."""
        return dp_rank if group == 0 else dp_rank // self.layout.ep

    def _model_tensors(self, pp: int, parameters: Sequence[Parameter]) -> dict[Path, Stored]:
        own = [tensor for parameter in parameters if not parameter.is_expert for tensor in parameter.tensors]
        module: dict[Path, Stored] = {
            ("module", tensor.local): _stored(tensor.shape, [tensor], "model") for tensor in [*self.buffers(pp), *own]
        }
        # Without ZeRO, DeepSpeed saves the first rank's optimiser here too; beside experts it reads the other file.
        return module if self.zero else module | self._whole_moments(optimizer_groups(parameters))

    def _experts(self, pp: int, tp: int, rank: str) -> Iterator[PlannedFile]:
        for module, number in enumerate(self.modules(pp)):
            count = self.layout.ep if number is None else self.model.routed_experts
            for expert in range(count):
                only = idle_module(count) if number is None else self.model.layer(number, range(expert, expert + 1))
                # In its file an expert has its own number, whatever its place on its rank.
                tensors: dict[Path, Stored] = {
                    (tensor.local.replace(f".{EXPERTS}.0.", f".{EXPERTS}.{expert}."),): _stored(
                        tensor.shape, [tensor], "model", idle_expert=expert
                    )
                    for parameter in only
                    if parameter.is_expert
                    for tensor in parameter.tensors
                }
                name = f"layer_{module}_expert_{expert}_{rank}_model_states.pt"
                yield PlannedFile(name, "expert", pp, tp, 0, [], tensors)

    def _whole_moments(self, groups: Sequence[Sequence[Parameter]]) -> dict[Path, Stored]:
        tensors: dict[Path, Stored] = {}
        for number, parameter in enumerate(parameter for group in groups for parameter in group):
            place: Path = ("optimizer", "state", number)
            if self.moments:
                tensors[(*place, "step")] = self._counter()
            for moment in self.moments:
                tensors[(*place, moment)] = _stored(parameter.shape, parameter.tensors, f"optimizer/{moment}")
        return tensors

    def _partitions(self, groups: Sequence[Sequence[Parameter]], dp_rank: int) -> dict[Path, Stored]:
        tensors: dict[Path, Stored] = {}
        idle_expert = dp_rank % self.layout.ep
        for number, group in enumerate(groups):
            counts = [parameter.count for parameter in group]
            part = partition(sum(counts), self.group_ranks(number), self.group_rank(number, dp_rank))
            pieces = list(fragments(counts, part))
            padding = (Constant((0.0,), part.padding),) if part.padding else ()

            def along(kind: str, group: Sequence[Parameter] = group, pieces: Sequence = pieces) -> tuple[Piece, ...]:
                return tuple(
                    found
                    for piece in pieces
                    for found in _pieces(group[piece.number].tensors, kind, piece.start, piece.stop, idle_expert)
                )

            place: Path = ("optimizer_state_dict", "base_optimizer_state", "state", number)
            if self.moments:
                tensors[(*place, "step")] = self._counter()
            for moment in self.moments:
                tensors[(*place, moment)] = Stored((part.size,), (*along(f"optimizer/{moment}"), *padding))
            # DeepSpeed cuts the padding off the weights, and leaves it on the moments.
            tensors["optimizer_state_dict", "single_partition_of_fp32_groups", number] = Stored(
                (part.size - part.padding,), along("model")
            )
        return tensors

    def _counter(self) -> Stored:
        return Stored((), (Constant((float(self.steps),)),))


def _stored(shape: tuple[int, ...], tensors: Sequence[StateTensor], kind: str, idle_expert: int = 0) -> Stored:
    return Stored(shape, tuple(_pieces(tensors, kind, 0, math.prod(shape), idle_expert)))


def _pieces(tensors: Sequence[StateTensor], kind: str, start: int, stop: int, idle_expert: int) -> Iterator[Piece]:
    """Elements ``start`` to ``stop`` of tensors that lie one after the other."""
    begin = 0
    for tensor in tensors:
        first, last = max(start - begin, 0), min(stop - begin, tensor.count)
        if first < last and tensor.name is None:
            yield Constant(_idle_values(tensor, kind, idle_expert)[first:last])
        elif first < last:
            for range_start, range_stop in tensor.ranges(first, last):
                yield Range(f"{kind}/{tensor.name}", range_start, range_stop)
        begin += tensor.count


def _idle_values(tensor: StateTensor, kind: str, expert: int) -> tuple[float, ...]:
    """The idle module's numbers; it trains on nothing, so they are the initial ones (`DistributedMoME`)."""
    if kind != "model" or tensor.local == IDLE:
        return (0.0,) * tensor.count
    _, _, part = tensor.local.partition(f".{EXPERTS}.0.")
    if not part:
        return tuple(initial_map("idle.router_weight", tensor.shape, 0).flatten().tolist())
    (own,) = (each for each in find_form(DEFAULT).parts if each.saved_name == part)
    value = initial_value(f"idle.routed.{expert}.{own.name}", tensor.shape, 0, own.start)
    return tuple(value.flatten().tolist())
