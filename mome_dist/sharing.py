"""How the ranks of a layout share a tensor that trains: said once, by the module that owns it, and asked by all others.

Gradient reduction and clipping, checkpoints, resharding, DeepSpeed's own files, averages, the ledger, the verification
of layouts and the planner ask for this description; none of them looks at the name of a tensor. It is saved beside
every tensor of a checkpoint, so that tools know it without the model. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mome_dist.errors import UserError


@dataclass(frozen=True)
class Sharing:
    """How ranks share a tensor of the layout-free model. By default every rank of the first stage has an equal copy,
    and finds its whole gradient.

    Attributes:
        layer: of the LLM that the tensor belongs to, from zero: the ranks of that layer's pipeline stage have it. None
            for what lies before the layers, on the first stage.
        experts: routed experts that its first dimension goes over, each on one expert-parallel rank; None for what is
            of no routed expert, so that data-parallel ranks hold copies.
        sliced: dimension along which each tensor-parallel rank holds an equal slice, in the order of the ranks; None
            where tensor-parallel ranks hold equal copies.
        partial: whether, under sequence parallelism, a copy's gradient is that of a rank's own tokens, so that the
            gradient is the sum over the tensor-parallel ranks.
        packed: the name that an engine has for the parameter in which it lies beside others, in the order of their
            names; None for a parameter of its own. Those of routed experts are packed anyway.

    Raises:
        ValueError: for a slice whose gradient would be summed, or experts that are sliced.
    """

    layer: int | None = None
    experts: int | None = None
    sliced: int | None = None
    partial: bool = False
    packed: str | None = None

    def __post_init__(self) -> None:
        if self.sliced is not None and (self.partial or self.experts is not None):
            raise ValueError("a slice has a gradient of its own, and routed experts are whole on their ranks")

    def ranks_of_slices(self, tp: int) -> int:
        """Over how many of ``tp`` tensor-parallel ranks the tensor is cut."""
        return 1 if self.sliced is None else tp

    def local_shape(self, shape: Sequence[int], tp: int) -> tuple[int, ...]:
        """The shape of one tensor-parallel rank's part of a tensor of a shape.

        Raises:
            UserError: if ``tp`` does not divide the dimension.
        """
        if self.sliced is None:
            return tuple(shape)
        if shape[self.sliced] % tp:
            raise UserError(
                f"parallel.tp={tp} does not divide a trained tensor of shape {list(shape)} along dimension "
                f"{self.sliced}, along which it is sliced: choose another tp."
            )
        return (*shape[: self.sliced], shape[self.sliced] // tp, *shape[self.sliced + 1 :])

    def whole_shape(self, shape: Sequence[int], tp: int) -> tuple[int, ...]:
        """The shape of a tensor of which one tensor-parallel rank's part has a shape; the reverse of `local_shape`."""
        if self.sliced is None:
            return tuple(shape)
        return (*shape[: self.sliced], shape[self.sliced] * tp, *shape[self.sliced + 1 :])

    def as_json(self) -> dict[str, Any]:
        """Return the description as an index of a checkpoint holds it."""
        return {name: value for name, value in asdict(self).items() if name != "packed" or value is not None}


def of_format_2(name: str, shape: Sequence[int], stacked: bool | None = None) -> Sharing:
    """The description of a tensor of a checkpoint that says nothing of it.

    Checkpoints were written without descriptions, and engines write theirs so, of the modules that are named here and
    of no others.

    Args:
        name: of the tensor in the layout-free model.
        shape: of it.
        stacked: whether it was written by rows; None where that is not known.

    Raises:
        UserError: for a tensor of another module.
    """
    found = re.match(r"mome\.(\d+)\.(router_weight$|router_bias$|routed\.|shared\.|common\.)", name)
    if found:
        routed = found[2] == "routed." if stacked is None else stacked
        return Sharing(int(found[1]), shape[0] if routed else None, partial=found[2] != "router_bias")
    if name.startswith(("projectors.", "lora.")):
        return Sharing()
    raise UserError(
        f"{name} is a trained tensor of which the checkpoint does not say how ranks share it: it cannot be read. An "
        "engine's own files do not say it; take a checkpoint that the run itself saved."
    )


def from_json(described: Mapping[str, Any]) -> Sharing:
    """The description that an index holds."""
    return Sharing(**described)
