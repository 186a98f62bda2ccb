"""Reading a DeepSpeed checkpoint, whoever wrote it: the tensors of the layout-free model out of the files of a layout.

The files say themselves which layout they are of. From that follows which file must hold which numbers (`plan`); every
file is compared with it, then a tensor's ranges are looked up. Files are pickles: they are loaded with
``weights_only=True`` and nothing but DeepSpeed's own plain classes allowed.
"""

from __future__ import annotations

import bisect
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mome_dist.checkpoint.deepspeed.names import EXPERT_PARTS, EXPERTS, GATE, ModelTensors
from mome_dist.checkpoint.deepspeed.plan import Plan, PlannedFile, Stored
from mome_dist.checkpoint.deepspeed.plan import Path as Place
from mome_dist.checkpoint.deepspeed.write import CLIENT_KEY
from mome_dist.checkpoint.pieces import Range, TensorFacts
from mome_dist.checkpoint.source import CHUNK
from mome_dist.errors import UserError
from mome_dist.parallel.layout import Layout

_MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_OPEN_FILES = 64  # kept mapped


@dataclass(frozen=True)
class _Stretch:
    """Elements ``start`` to ``stop`` of a tensor: in a file, at a place, from element ``offset``."""

    start: int
    stop: int
    file: str
    place: Place
    offset: int


def is_deepspeed(directory: Path) -> bool:
    """Whether a directory looks like a DeepSpeed checkpoint, or like one tag of it."""
    return any(_MODEL_FILE.fullmatch(path.name) for path in _tag_directory(directory).glob("mp_rank_*"))


def _tag_directory(directory: Path) -> Path:
    latest = directory / "latest"
    return directory / latest.read_text().strip() if latest.is_file() else directory


class DeepSpeedSource:
    """The tensors of a DeepSpeed checkpoint.

    Args:
        directory: with ``latest``, or of one tag.

    Attributes:
        facts: of every tensor, by layout-free name.
        plan: what the files were found to be.
        client: what this project stored beside the tensors; None in a checkpoint that an engine saved.
        step, skipped: training steps done, and those of them without an update.

    Raises:
        UserError: for a missing, surplus, damaged or forbidden file, by name.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = _tag_directory(directory)
        self._opened: OrderedDict[str, dict[Any, Any]] = OrderedDict()
        names = {path.name for path in self.directory.glob("*")}
        ranks = sorted(int(match[1]) for name in names if (match := _MODEL_FILE.fullmatch(name)))
        if not ranks:
            raise UserError(f"{self.directory} holds no mp_rank_00_model_states.pt; it is no DeepSpeed checkpoint.")
        first = self._load("mp_rank_00_model_states.pt")
        self.client: dict[str, Any] | None = first.get(CLIENT_KEY)
        self.step, self.skipped = int(first["global_steps"]), int(first["skipped_steps"])
        self.plan = self._recognise(first)
        self.facts: dict[str, TensorFacts] = {}
        self._stretches: dict[str, list[_Stretch]] = {}
        self._check_files(names)
        self._finish()

    def __enter__(self) -> DeepSpeedSource:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.clear()

    def chunks(self, piece: Range) -> Iterator[memoryview]:
        """The bytes of a range, in order; each view holds until the next is asked for."""
        stretches = self._stretches[piece.tensor]
        number = bisect.bisect_right(stretches, piece.start, key=lambda stretch: stretch.start) - 1
        position = piece.start
        while position < piece.stop:
            stretch = stretches[number]
            flat = _at(self._load(stretch.file), stretch.place).reshape(-1)
            stop = min(piece.stop, stretch.stop)
            for begin in range(position, stop, CHUNK // 4):
                end = min(begin + CHUNK // 4, stop)
                part = flat[begin - stretch.start + stretch.offset : end - stretch.start + stretch.offset]
                yield memoryview(part.numpy()).cast("B")
            position, number = stop, number + 1

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
            ep = int(groups[0].removeprefix("ep_size_"))
            stages = [self._layers(f"mp_rank_{rank * tp:02d}_model_states.pt") for rank in range(pp)]
            state = optimizer["state"].get(0, {})
            moments = tuple(sorted(name for name in state if name != "step"))
            model = ModelTensors(self._shapes(tp, stages))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.directory} is not what an engine of this project saves ({type(error).__name__}: {error})."
            ) from error
        steps = int(state["step"]) if moments else self.step
        return Plan(model, Layout(tp, pp, ep, dp), stages, zero, moments, steps)

    def _optimizer(self, zero: int) -> dict[str, Any]:
        if zero:
            return self._load("zero_pp_rank_0_mp_rank_00_optim_states.pt")["optimizer_state_dict"]["base_optimizer_state"]
        return self._load("expp_rank_0_mp_rank_00_optim_states.pt")["optimizer"]

    def _layers(self, name: str) -> list[int]:
        modules = dict.fromkeys(key.partition(".")[0] for key in self._load(name)["module"])
        return [int(module.removeprefix("layer_")) for module in modules if module.startswith("layer_")]

    def _shapes(self, tp: int, stages: list[list[int]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the layout-free model, from the first tensor-parallel rank of every stage."""
        shapes: dict[str, tuple[int, ...]] = {}
        for stage, layers in enumerate(stages):
            rank = f"mp_rank_{stage * tp:02d}_model_states.pt"
            for key, value in self._load(rank)["module"].items():
                module, _, rest = key.partition(".")
                if module != "idle":
                    layer = f"mome.{module.removeprefix('layer_')}"
                    renamed = {f"{GATE}.wg.weight": f"{layer}.router_weight", f"{GATE}.bias_E": f"{layer}.router_bias"}
                    shapes[key if module == "projectors" else renamed.get(rest, f"{layer}.{rest}")] = tuple(value.shape)
            for module_number, number in enumerate(layers):
                expert = self._load(f"layer_{module_number}_expert_0_{rank}")
                experts = shapes[f"mome.{number}.router_weight"][0]
                for part, kind in EXPERT_PARTS.items():
                    shape = expert[f"layer_{number}.{EXPERTS}.0.{part}"].shape
                    shapes[f"mome.{number}.routed.{kind}"] = (experts, *shape)
        return shapes

    # -- comparing every file with the plan

    def _check_files(self, names: set[str]) -> None:
        planned_names = set()
        for planned in self.plan.files():
            planned_names.add(planned.name)
            if planned.name not in names:
                raise UserError(f"{self.directory / planned.name} is missing: the checkpoint is not complete.")
            self._check_file(planned)
        surplus = sorted(names - planned_names)
        if surplus:
            raise UserError(
                f"{self.directory / surplus[0]} is none of the files of {self.plan.layout.describe()}, ZeRO "
                f"{self.plan.zero}; {len(surplus)} such file(s). Remove them if they are of another save."
            )

    def _check_file(self, planned: PlannedFile) -> None:
        content = self._load(planned.name)
        if planned.kind == "model":
            surplus = set(content.get("module", ())) - {str(place[1]) for place in planned.tensors}
            if surplus:
                raise UserError(f"{self.directory / planned.name} holds {sorted(surplus)[0]}, which is not of its stage.")
        for place, stored in planned.tensors.items():
            try:
                tensor = _at(content, place)
            except (KeyError, IndexError, TypeError):
                raise UserError(f"{self.directory / planned.name} holds no {_words(place)}; damaged.") from None
            if tuple(tensor.shape) != stored.shape or tensor.dtype != torch.float32:
                raise UserError(
                    f"{self.directory / planned.name}: {_words(place)} is {tensor.dtype} {list(tensor.shape)}, "
                    f"expected torch.float32 {list(stored.shape)}."
                )
            # Tensor-parallel ranks hold copies, and ZeRO's partitions copies of the weights.
            if planned.tp == 0 and not (planned.kind == "zero" and "single_partition_of_fp32_groups" in place):
                self._register(planned.name, place, stored)

    def _register(self, file: str, place: Place, stored: Stored) -> None:
        offset = 0
        for piece in stored.pieces:
            if isinstance(piece, Range):
                known = self._stretches.setdefault(piece.tensor, [])
                # Without ZeRO, every expert-parallel rank has the moments of shared parameters.
                if not any(stretch.start == piece.start for stretch in known):
                    known.append(_Stretch(piece.start, piece.stop, file, place, offset))
            offset += piece.count

    def _finish(self) -> None:
        for name, stretches in self._stretches.items():
            stretches.sort(key=lambda stretch: stretch.start)
            shape = self.plan.model.shapes[re.sub(r"^(model|optimizer/\w+)/", "", name)]
            self.facts[name] = TensorFacts(shape, "float32", ".routed." in name)
        self.facts = dict(sorted(self.facts.items()))

    def _load(self, name: str) -> dict[Any, Any]:
        """A file's contents, tensors mapped from disk."""
        if name in self._opened:
            self._opened.move_to_end(name)
            return self._opened[name]
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing: the checkpoint is not complete.")
        try:
            with torch.serialization.safe_globals(_allowed()):
                content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0].split(". This")[0]
            raise UserError(f"{path} cannot be read: damaged, or holds what is not allowed ({reason})") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} holds a {type(content).__name__}; it is no file of a DeepSpeed checkpoint.")
        self._opened[name] = content
        if len(self._opened) > _OPEN_FILES:
            self._opened.popitem(last=False)
        return content


def _allowed() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The classes of DeepSpeed that its own checkpoints refer to: plain records, without code of their own at loading."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def _at(content: Any, place: Place) -> Tensor:
    for key in place:
        content = content[key]
    if not isinstance(content, Tensor):
        raise TypeError(place)
    return content.detach()


def _words(place: Place) -> str:
    return " / ".join(map(str, place))
