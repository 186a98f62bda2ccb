"""Which parameters the engine of a rank has, in which order, and what they are in the layout-free model.

The engine is given a ``ModuleDict`` (`DistributedMoME.trainable_modules`): ``layer_N`` in layer order, ``idle`` on a
rank where the engine would miss something, ``projectors`` and ``lora`` on the first stage, then what else trains. What
is in no ``layer_N`` is called in the engine as in the layout-free model. DeepSpeed numbers parameters in the order of
that dictionary, shared ones first, then those of experts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mome_dist.errors import UserError
from mome_dist.moe.forms.base import part_order, saved_name
from mome_dist.moe.forms.registry import DEFAULT, find_form
from mome_dist.sharing import Sharing, of_format_2

EXPERTS = "deepspeed_moe.experts.deepspeed_experts"
PACKED = "deepspeed_moe.experts.packed"
GATE = "deepspeed_moe.gate"
ROUTER = f"{GATE}.wg"
_ROUTER = re.compile(r"(mome\.\d+)\.router_")
# The bias of a router was a buffer of the gate once.
OLD_BIAS, BIAS = f"{GATE}.bias_E", f"{ROUTER}.bias"
IDLE = "idle.weight"  # the one number of a rank where nothing trains, in a run without experts
# The order of the modules after the layers; others come after these, by their names.
MODULE_ORDER = ("projectors", "lora")
# `split_params_into_different_moe_groups_for_optimizer` starts a new group of experts beyond this many elements.
LARGEST_EXPERT_GROUP = 178_956_971


@dataclass(frozen=True)
class Cut:
    """A tensor-parallel rank's slice: of ``ranks`` equal ones along dimension ``dim``, the one of ``rank``."""

    dim: int
    rank: int
    ranks: int


@dataclass(frozen=True)
class StateTensor:
    """A tensor of the state dict of a rank's engine.

    Attributes:
        local: its name there.
        shape: of it.
        name: of the tensor in the layout-free model; None for the idle module, which stands for no part of it.
        index: which row of that tensor, of an expert, it is; None for the whole tensor.
        cut: which slice of that tensor it is; None where tensor-parallel ranks hold copies.
    """

    local: str
    shape: tuple[int, ...]
    name: str | None
    index: int | None = None
    cut: Cut | None = None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def ranges(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Where its elements ``first`` to ``last`` lie among those of the layout-free tensor, in order."""
        if self.cut is None:
            origin = 0 if self.index is None else self.index * self.count
            yield origin + first, origin + last
            return
        run = math.prod(self.shape[self.cut.dim :])  # elements that lie side by side in both
        while first < last:
            block, inside = divmod(first, run)
            taken = min(last - first, run - inside)
            begin = (block * self.cut.ranks + self.cut.rank) * run + inside
            yield begin, begin + taken
            first += taken


@dataclass(frozen=True)
class Parameter:
    """A parameter of a rank's engine.

    Attributes:
        local: its name in the engine.
        shape: of it.
        tensors: of the state dict that lie in it, one after the other: itself, or the parts of a layer's experts.
    """

    local: str
    shape: tuple[int, ...]
    tensors: tuple[StateTensor, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def is_expert(self) -> bool:
        return self.local.endswith(f".{PACKED}")


def engine_name(name: str) -> str:
    """What an engine calls a router's tensor, which the layout-free model calls ``mome.N.router_NAME``."""
    layer, _, rest = name.partition(".router_")
    return f"{layer.replace('mome.', 'layer_')}.{ROUTER}.{rest}"


def walked_name(name: str) -> str:
    """What torch's walk through an engine's modules calls a tensor of a state dict: a router's tensor that is of no
    ``layer_N`` has its layout-free name in the state dict, but lies in a module of its own."""
    return _ROUTER.sub(r"\1.router.", name)


def layout_free_name(layer: str, rest: str) -> str:
    """The layout-free name of what an engine calls ``rest`` in a module of the layer ``mome.N``, other than experts."""
    of_router = rest.removeprefix(f"{ROUTER}.")
    return f"{layer}.{rest}" if of_router == rest else f"{layer}.router_{of_router}"


def _single(tensor: StateTensor) -> Parameter:
    return Parameter(tensor.local, tensor.shape, (tensor,))


def _of_tensors(local: str, tensors: Sequence[StateTensor]) -> Parameter:
    """A parameter of one tensor that is called like it, or of several (`Sharing.packed`)."""
    if local == tensors[0].local:
        return _single(tensors[0])
    return Parameter(local, (sum(tensor.count for tensor in tensors),), tuple(tensors))


def _packed(module: str, experts: Sequence[Sequence[StateTensor]]) -> Parameter:
    """The parameter of all experts of a module (`mome_dist.moe.routed`)."""
    numbers = sum(tensor.count for tensor in experts[0])
    return Parameter(
        f"{module}.{PACKED}", (len(experts), numbers), tuple(tensor for expert in experts for tensor in expert)
    )


class ModelTensors:
    """The shapes of a layout-free model.

    Args:
        shapes: of all weights and states of routers by name, without ``model/``.
        sharing: how ranks share each of them; None for a checkpoint that does not say it (`of_format_2`).
        layers: of the LLM; None takes those that have a MoME module.

    Raises:
        UserError: if they are not those of a model of this project.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        sharing: Mapping[str, Sharing] | None = None,
        layers: int | None = None,
    ) -> None:
        self.shapes = dict(shapes)
        self.sharing = sharing or {name: of_format_2(name, shape) for name, shape in shapes.items()}
        found = {name: int(match[1]) for name in shapes if (match := re.match(r"mome\.(\d+)\.", name))}
        # Where none is on some expert-parallel rank alone, experts are trained parts like others.
        numbers = {number for name, number in found.items() if self.sharing[name].experts is not None}
        self._moe = {name for name, number in found.items() if number in numbers}
        self._states = {name for name in shapes if _ROUTER.match(name) and not self.sharing[name].partial}
        self.layers = len(numbers) if layers is None else layers
        if numbers and numbers != set(range(self.layers)):
            raise UserError(f"the checkpoint's MoME modules are of layers {sorted(numbers)}; expected 0, 1, 2 and on.")
        experts = {self.sharing[name].experts for name in self._moe} - {None}
        self.routed_experts = max((each for each in experts if each is not None), default=0)

    def layer(self, number: int, experts: range) -> list[Parameter]:
        """The parameters of a layer's MoME module on a rank that holds some of its routed experts."""
        prefix, local = f"mome.{number}", f"layer_{number}"
        found = self._router(number)
        held = [self._expert(number, expert, position) for position, expert in enumerate(experts)]
        found.append(_packed(local, held))
        for kind in self._parts(f"{prefix}.shared."):
            name = f"{prefix}.shared.{kind}"
            found.append(_single(StateTensor(f"{local}.shared.{kind}", self.shapes[name], name)))
        return found

    def _parts(self, prefix: str) -> list[str]:
        """The tensors of some experts, in the order of their form."""
        return sorted((name.removeprefix(prefix) for name in self._moe if name.startswith(prefix)), key=part_order)

    def _expert(self, number: int, expert: int, position: int) -> list[StateTensor]:
        """The tensors of an expert that has the given position on its rank."""
        tensors = []
        for kind in self._parts(f"mome.{number}.routed."):
            name = f"mome.{number}.routed.{kind}"
            local = f"layer_{number}.{EXPERTS}.{position}.{saved_name(kind)}"
            tensors.append(StateTensor(local, self.shapes[name][1:], name, expert))
        return tensors

    def _router_names(self, number: int) -> list[str]:
        return sorted((n for n in self.shapes if n.startswith(f"mome.{number}.router_")), key=module_order)

    def _router(self, number: int) -> list[Parameter]:
        """The parameters of a layer's router. What trains there has the gradient of a rank's own tokens."""
        held: dict[str, list[StateTensor]] = {}
        for name in self._router_names(number):
            if self.sharing[name].partial:
                tensor = StateTensor(engine_name(name), self.shapes[name], name)
                held.setdefault(engine_name(self.sharing[name].packed or name), []).append(tensor)
        return [_of_tensors(local, tensors) for local, tensors in held.items()]

    def router_states(self, number: int) -> list[StateTensor]:
        """The buffers of a layer's router."""
        names = [name for name in self._router_names(number) if name in self._states]
        local = {name: engine_name(name) if name in self._moe else name for name in names}
        return [StateTensor(local[name], self.shapes[name], name) for name in names]

    def whole_modules(
        self, layers: Sequence[int] = (), first_stage: bool = True, tp: int = 1, tp_rank: int = 0
    ) -> list[Parameter]:
        """The parameters that a rank has beside its MoME modules: those of its layers, and of the first stage."""
        chosen: list[str] = []
        for name in self.shapes.keys() - self._moe - self._states:
            layer = self.sharing[name].layer
            if first_stage if layer is None else layer in layers:
                chosen.append(name)
        held: dict[str, list[StateTensor]] = {}
        for name in sorted(chosen, key=module_order):
            held.setdefault(self.sharing[name].packed or name, []).append(self._part(name, tp, tp_rank))
        found = [_of_tensors(local, tensors) for local, tensors in held.items()]
        named = (dataclasses.replace(each, local=walked_name(each.local)) for each in found)
        return sorted(named, key=lambda each: module_order(each.local))

    def _part(self, name: str, tp: int, tp_rank: int) -> StateTensor:
        """What a tensor-parallel rank has of a tensor."""
        sharing, shape = self.sharing[name], self.shapes[name]
        cut = None if sharing.sliced is None else Cut(sharing.sliced, tp_rank, tp)
        return StateTensor(name, sharing.local_shape(shape, tp), name, cut=cut)


def module_order(name: str) -> list[tuple[int, int | str]]:
    """Sorts names as torch walks modules: numbers by value (also in ``rate16``), a weight before the bias beside it."""
    module = name.partition(".")[0]
    place = MODULE_ORDER.index(module) if module in MODULE_ORDER else len(MODULE_ORDER)
    pieces = [piece for piece in re.split(r"\.|(\d+)", name) if piece]
    return [
        (0, place),
        *((0, int(piece)) if piece.isdigit() else (1, piece.removesuffix("weight")) for piece in pieces),
    ]


def idle_module(ep: int) -> list[Parameter]:
    """The parameters of the module of one unit on a rank without layers."""
    expert = [
        StateTensor(f"idle.{EXPERTS}.0.{part.saved_name}", part.shape(1, 1), None) for part in find_form(DEFAULT).parts
    ]
    return [_single(StateTensor(f"idle.{GATE}.wg.weight", (ep, 1), None)), _packed("idle", [expert])]


def engine_parameters(
    model: ModelTensors,
    layers: Sequence[int],
    ep: int,
    ep_rank: int,
    first_stage: bool,
    tp: int = 1,
    tp_rank: int = 0,
) -> list[Parameter]:
    """The parameters of a rank's engine, in its order.

    Args:
        layers: numbers of the rank's layers, in its order.
        ep, ep_rank: expert-parallel ranks, and which of them it is.
        first_stage: whether the rank is of it.
        tp, tp_rank: tensor-parallel ranks, and which of them it is.
    """
    others = model.whole_modules(layers, first_stage, tp, tp_rank)
    if not model.routed_experts:
        return others or [_single(StateTensor(IDLE, (1,), None))]
    held = model.routed_experts // ep
    experts = range(ep_rank * held, (ep_rank + 1) * held)
    found = [parameter for number in layers for parameter in model.layer(number, experts)]
    return found + ([] if layers else idle_module(ep)) + others


def largest_group(counts: Iterable[int], largest: int = LARGEST_EXPERT_GROUP) -> int:
    """Elements of a group of experts at most, for expert parameters of some sizes: a group holds at least one, where
    DeepSpeed would make an empty group before one that is too large."""
    return max(largest, *counts, 0)


def optimizer_groups(parameters: Sequence[Parameter], largest: int = LARGEST_EXPERT_GROUP) -> list[list[Parameter]]:
    """The parameters of each optimiser group: the shared ones, then experts, if there are any, in one group or, if they
    are many, more."""
    groups: list[list[Parameter]] = [[parameter for parameter in parameters if not parameter.is_expert], []]
    size, largest = 0, largest_group((p.count for p in parameters if p.is_expert), largest)
    for parameter in parameters:
        if parameter.is_expert:
            size += parameter.count
            if size > largest:
                groups.append([])
                size = parameter.count
            groups[-1].append(parameter)
    return [group for group in groups if group]
