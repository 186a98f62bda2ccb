"""Reading a DeepSpeed checkpoint, whoever wrote it: the tensors of the layout-free model out of the files of a layout.

The files say themselves which layout they are of. From that follows which file must hold which numbers (`plan`); every
file is compared with it, then a tensor's ranges are looked up. Files are pickles: they are loaded with
``weights_only=True``, nothing but DeepSpeed's own plain classes allowed, and without the numbers of their tensors:
torch's fake tensors say at which byte of the file these begin.
"""

from __future__ import annotations

import base64
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mome_dist.checkpoint.deepspeed.plan import Path as Place
from mome_dist.checkpoint.deepspeed.plan import Plan, PlannedFile, Stored
from mome_dist.checkpoint.deepspeed.write import CLIENT_KEY
from mome_dist.checkpoint.pieces import Range, TensorFacts
from mome_dist.checkpoint.source import Source, Stretch
from mome_dist.engine.deepspeed_names import BIAS, EXPERTS, OLD_BIAS, ModelTensors, layout_free_name
from mome_dist.errors import UserError, first_line
from mome_dist.parallel.layout import Layout
from mome_dist.sharing import Sharing, from_json, of_format_2

_MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_FIRST_PARTITION, _FIRST_OPTIMIZER, _FIRST_MODEL = (
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "expp_rank_0_mp_rank_00_optim_states.pt",
    "mp_rank_00_model_states.pt",
)
_ITEM_SIZE = 4  # bytes of an fp32 number
_OPEN_FILES = 64  # whose contents are kept


def is_deepspeed(directory: Path) -> bool:
    """Whether a directory looks like a DeepSpeed checkpoint, or like one tag of it."""
    return any(_MODEL_FILE.fullmatch(path.name) for path in _tag_directory(directory).glob("mp_rank_*"))


def _tag_directory(directory: Path) -> Path:
    latest = directory / "latest"
    return directory / latest.read_text().strip() if latest.is_file() else directory


def open_deepspeed(directory: Path) -> tuple[Source, Plan]:
    """A DeepSpeed checkpoint, and what its files were found to be.

    Args:
        directory: with ``latest``, or of one tag.

    Returns:
        The source; one that an engine saved has a record without all that DeepSpeed does not know (`write_deepspeed`
        puts it into the client state), and no ``config``.

    Raises:
        UserError: for a missing, surplus, damaged or forbidden file, by name.
    """
    found = _Directory(_tag_directory(directory))
    facts, stretches = found.tensors()
    client = found.client
    if client is None:
        return Source(
            facts, stretches, {"step": found.plan.steps, "optimizer_steps": found.plan.steps}, None, None
        ), found.plan
    inline = {name: base64.b64decode(value["base64"]) for name, value in client["rng"].items()}
    facts |= {name: TensorFacts(tuple(value["shape"]), value["dtype"]) for name, value in client["rng"].items()}
    source = Source(facts, stretches, client["record"], client["config"], client["content"], inline)
    return source, found.plan


class _Directory:
    """A tag's directory, recognised."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._opened: OrderedDict[str, dict[Any, Any]] = OrderedDict()
        self._names = {path.name for path in directory.glob("*")}
        if not any(_MODEL_FILE.fullmatch(name) for name in self._names):
            raise UserError(f"{directory} holds no mp_rank_00_model_states.pt; it is no DeepSpeed checkpoint.")
        first = self._load(_FIRST_MODEL)
        self.client: dict[str, Any] | None = first.get(CLIENT_KEY)
        described = (self.client or {}).get("sharing")
        self._sharing = None if described is None else {name: from_json(each) for name, each in described.items()}
        self.plan = self._recognise(first)

    def tensors(self) -> tuple[dict[str, TensorFacts], dict[str, list[Stretch]]]:
        """Compare every file with the plan; return all tensors and where they are."""
        stretches: dict[str, list[Stretch]] = {}
        planned_names, known = set(), set()  # type: set[str], set[tuple[str, int]]
        for planned in self.plan.files():
            planned_names.add(planned.name)
            for place, stored in planned.tensors.items():
                offset = self._check(planned, place, stored)
                # ZeRO's partitions hold copies of the weights.
                if planned.kind == "zero" and "single_partition_of_fp32_groups" in place:
                    continue
                for piece in stored.pieces:
                    # Tensor-parallel ranks hold copies of what is not sliced, and without ZeRO every expert-parallel
                    # rank has the moments of shared parameters.
                    new = isinstance(piece, Range) and (piece.tensor, piece.start) not in known
                    if isinstance(piece, Range) and new and (not planned.tp or self._is_sliced(piece.tensor)):
                        known.add((piece.tensor, piece.start))
                        stretch = Stretch(piece.start, piece.stop, self.directory / planned.name, offset)
                        stretches.setdefault(piece.tensor, []).append(stretch)
                    offset += piece.count * _ITEM_SIZE
        surplus = sorted(self._names - planned_names)
        if surplus:
            raise UserError(
                f"{self.directory / surplus[0]} is none of the files of {self.plan.layout.describe()}, ZeRO "
                f"{self.plan.zero}; {len(surplus)} such file(s). Remove them if they are of another save."
            )
        facts = {}
        for name in sorted(stretches):
            stretches[name].sort(key=lambda stretch: stretch.start)
            short = _short(name)
            facts[name] = TensorFacts(self.plan.model.shapes[short], "float32", self.plan.model.sharing[short])
        return facts, stretches

    def _is_sliced(self, name: str) -> bool:
        return self.plan.model.sharing[_short(name)].sliced is not None

    # -- what the files say of themselves

    def _recognise(self, first: dict[Any, Any]) -> Plan:
        try:
            dimensions = first["checkpoint_parallel_dimensions"]
            tp, pp, dp = dimensions["tp_degree"], dimensions["pp_degree"], first["dp_world_size"]
            zero = int(first["ds_config"].get("zero_optimization", {}).get("stage", 0))
            if zero not in (0, 1, 2):
                raise UserError(f"{self.directory} was written with ZeRO {zero}; 0, 1 and 2 can be read.")
            optimizer = self._optimizer(zero)
            groups = [group["name"] for group in optimizer["param_groups"] if group.get("moe")]
            ep = int(groups[0].removeprefix("ep_size_")) if groups else 1
            stages = [self._layers(f"mp_rank_{rank * tp:02d}_model_states.pt") for rank in range(pp)]
            state = optimizer["state"].get(0, {})
            moments = tuple(sorted(name for name in state if name != "step"))
            steps = self._counter(zero, state["step"]) if moments else int(first["global_steps"])
            shapes = self._shapes(tp, stages)
            layers = None if self.client is None else self.client["record"].get("layers")
            model = ModelTensors(shapes, {name: self._shared(name, shape) for name, shape in shapes.items()}, layers)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.directory} is not what an engine of this project saves ({type(error).__name__}: {error})."
            ) from error
        return Plan(model, Layout(tp, pp, ep, dp), stages, zero, moments, steps)

    def _optimizer(self, zero: int) -> dict[str, Any]:
        if zero:
            return self._load("zero_pp_rank_0_mp_rank_00_optim_states.pt")["optimizer_state_dict"][
                "base_optimizer_state"
            ]
        return self._load(self._first_optimizer)["optimizer"]

    @property
    def _first_optimizer(self) -> str:
        """The file of the first rank's optimiser without ZeRO; in a run without experts the model's."""
        return _FIRST_OPTIMIZER if _FIRST_OPTIMIZER in self._names else _FIRST_MODEL

    def _counter(self, zero: int, step: Tensor) -> int:
        """Steps that the optimiser counted; the engine's own count begins anew with every process."""
        with (self.directory / (_FIRST_PARTITION if zero else self._first_optimizer)).open("rb") as file:
            file.seek(_offset(step))
            return int(struct.unpack("<f", file.read(_ITEM_SIZE))[0])

    def _layers(self, name: str) -> list[int]:
        """The layers of a stage of which something trains, in its order."""
        keys = list(self._load(name)["module"])
        modules = dict.fromkeys(key.partition(".")[0] for key in keys)
        found = [int(module.removeprefix("layer_")) for module in modules if module.startswith("layer_")]
        if found or self._sharing is None:
            return found
        layers = {self._sharing[key].layer for key in keys if key in self._sharing}
        return sorted(layer for layer in layers if layer is not None)

    def _shared(self, name: str, shape: tuple[int, ...]) -> Sharing:
        """How ranks share a tensor; an engine that saves by itself does not say it."""
        return of_format_2(name, shape) if self._sharing is None else self._sharing[name]

    def _shapes(self, tp: int, stages: list[list[int]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the layout-free model, from the first tensor-parallel rank of every stage."""
        shapes: dict[str, tuple[int, ...]] = {}
        for stage, layers in enumerate(stages):
            rank = f"mp_rank_{stage * tp:02d}_model_states.pt"
            states = self._load(rank)["module"]
            for key, value in states.items():
                module, _, rest = key.partition(".")
                if module != "idle":
                    layer = f"mome.{module.removeprefix('layer_')}"
                    name = layout_free_name(layer, rest) if module.startswith("layer_") else key
                    held = tuple(value.shape)
                    shapes[name] = self._shared(name, held).whole_shape(held, tp)
            with_experts = [n for n in layers if any(key.startswith(f"layer_{n}.") for key in states)]
            for module_number, number in enumerate(with_experts):
                expert = self._load(f"layer_{module_number}_expert_0_{rank}")
                experts = self._experts(shapes, number, module_number)
                first = f"layer_{number}.{EXPERTS}.0."
                for key, value in expert.items():
                    if key.startswith(first):
                        kind = key.removeprefix(first).replace(".", "_")
                        shapes[f"mome.{number}.routed.{kind}"] = (experts, *value.shape)
        return shapes

    def _experts(self, shapes: dict[str, tuple[int, ...]], number: int, module: int) -> int:
        """The experts of a layer: as many as its router has rows, if that is one map, else as many as have files."""
        rows = shapes.get(f"mome.{number}.router_weight")
        files = (re.match(rf"layer_{module}_expert_(\d+)_", name) for name in self._names)
        return rows[0] if rows is not None else max(int(found[1]) for found in files if found) + 1

    def _check(self, planned: PlannedFile, place: Place, stored: Stored) -> int:
        """Compare a tensor of a file with the plan; return the byte at which it begins."""
        path = self.directory / planned.name
        content: Any = self._load(planned.name)
        try:
            for key in place:
                content = content[key]
        except (KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, Tensor):
            raise UserError(f"{path} holds no {_words(place)}; damaged.")
        if tuple(content.shape) != stored.shape or content.dtype != torch.float32 or not content.is_contiguous():
            raise UserError(
                f"{path}: {_words(place)} is {content.dtype} {list(content.shape)}, expected torch.float32 "
                f"{list(stored.shape)}."
            )
        return _offset(content)

    def _load(self, name: str) -> dict[Any, Any]:
        """A file's contents, with fake tensors."""
        if name in self._opened:
            self._opened.move_to_end(name)
            return self._opened[name]
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing: the checkpoint is not complete.")
        try:
            with torch.serialization.safe_globals(allowed_classes()), FakeTensorMode():
                content = torch.load(path, weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it refers to {found[1]}" if found else first_line(error)
            raise UserError(f"{path} cannot be read: damaged, or holds what is not allowed ({reason})") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} holds a {type(content).__name__}; it is no file of a DeepSpeed checkpoint.")
        if isinstance(content.get("module"), dict):
            content["module"] = {name.replace(OLD_BIAS, BIAS): value for name, value in content["module"].items()}
        self._opened[name] = content
        if len(self._opened) > _OPEN_FILES:
            self._opened.popitem(last=False)
        return content


def _short(name: str) -> str:
    """The name of a tensor of the model, from that of its weights or of a moment."""
    return re.sub(r"^(model|optimizer/\w+)/", "", name)


def allowed_classes() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The classes of DeepSpeed that its checkpoints refer to: plain records that run no code when they are loaded."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def _offset(tensor: Tensor) -> int:
    """The byte of its file at which a fake tensor's numbers begin."""
    begin = tensor.untyped_storage()._checkpoint_offset
    assert begin is not None, "loaded inside FakeTensorMode"
    return begin + int(tensor.storage_offset()) * _ITEM_SIZE


def _words(place: Place) -> str:
    return " / ".join(map(str, place))
