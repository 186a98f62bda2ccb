"""The trainability ledger: every parameter does what it was declared to do, or the run stops and names it.

The field's silent failures are parameters that should train and do not (left out of the optimiser, cut off from the
loss, dropped in a reduction) and frozen ones that move. The ledger looks at every tensor on every rank: at the start,
after the first steps, and at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mome_dist.checkpoint.format import CheckpointReader
from mome_dist.engine.engine import Engine
from mome_dist.errors import UserError
from mome_dist.model.distributed import DistributedMoME
from mome_dist.parallel.parts import NamedPart
from mome_dist.training.batches import Step

CHUNK = 1 << 20  # elements that a checksum reads at a time


class Ledger:
    """Watches a run. All methods are collective.

    Args:
        model, engine: of this rank.
        watched_steps: steps after which every parameter must have had a gradient and moved: enough that every view was
            trained on, and that the gradient has passed the weights that start at zero.
        encoders: that encode while the run trains, by stream: all of them but their LoRA is frozen.

    Raises:
        UserError: from each method, naming the parameters at fault, on all ranks.
    """

    def __init__(
        self, model: DistributedMoME, engine: Engine, watched_steps: int, encoders: Mapping[str, nn.Module]
    ) -> None:
        self._model, self._engine, self._watched_steps, self._encoders = model, engine, watched_steps, encoders
        self._trainable = {part.label: part for part in model.trained_parts()}
        self._steps = 0
        self._visits: dict[int, Tensor] = {}
        self._check_groups()
        self._frozen_at_start = self._frozen_checksums()
        self._trainable_at_start = {name: checksum(part.value) for name, part in self._trainable.items()}

    def after_step(self, step: Step) -> None:
        """Note which experts were used, while their load is there; at the last watched step, check gradients and
        movement. A view that counts for nothing has no gradient for the experts that it uses."""
        self._steps += 1
        if self._steps > self._watched_steps:
            return
        for chunk in self._model.parts():
            load, weights = chunk.statistics.step_load, zip(step.views, step.weights, strict=True)
            counted = [load[str(view)] for view, weight in weights if weight and load]
            if counted:
                for number, used_E in zip(chunk.momes, torch.stack(counted).sum(dim=0) > 0, strict=True):
                    before_E = self._visits.get(number, torch.zeros_like(used_E, dtype=torch.int64))
                    self._visits[number] = before_E + used_E
        if self._steps == self._watched_steps:
            self._check_training()

    def finish(self, checkpoint: Path) -> str:
        """Check the frozen parameters and what the last checkpoint holds; return a line that says what was checked."""
        at_end = self._frozen_checksums()
        changed = [name for name, before in self._frozen_at_start.items() if at_end[name] != before]
        with CheckpointReader(checkpoint) as reader:
            saved = {name.removeprefix("model/"): reader.index["tensors"][name] for name in reader.names("model/")}
        whole = {part.name: _stacked_shape(part) for part in self._trainable.values()}
        problems = [f"frozen parameter {name} changed" for name in changed]
        for name, shape in sorted(whole.items()):
            if name not in saved:
                problems.append(f"{name} trains, but is not in {checkpoint.name}")
            elif saved[name]["shape"] != shape:
                found = saved[name]["shape"]
                problems.append(f"{name} trains with shape {shape}, but {checkpoint.name} holds {found} of it")
        _stop_if(problems)
        judged = self._steps >= self._watched_steps
        trained = "with gradients and moved" if judged else f"too few steps to judge (under {self._watched_steps})"
        return (
            f"ledger of rank 0: {len(self._trainable):,} trainable tensors, each in one optimiser group, {trained}, in "
            f"the checkpoint; {len(at_end):,} frozen tensors unchanged"
        )

    def _check_groups(self) -> None:
        held: Counter[Tensor] = Counter(parameter for group in self._engine.parameter_groups() for parameter in group)
        problems = [
            f"{name} is in {held[part.parameter]} optimiser groups instead of one"
            for name, part in self._trainable.items()
            if held[part.parameter] != 1
        ]
        problems += [
            f"frozen parameter {name} is in an optimiser group"
            for name, parameter, _ in self._frozen()
            if parameter in held
        ]
        _stop_if(problems)

    def _check_training(self) -> None:
        problems, reached = [], self._engine.reached_by_gradient(list(self._trainable.values()))
        for (name, part), is_reached in zip(self._trainable.items(), reached, strict=True):
            if not self._expected(part):
                continue
            if not is_reached:
                problems.append(f"no gradient of {name} reached the optimiser in {self._steps} steps")
            elif checksum(part.value) == self._trainable_at_start[name]:
                problems.append(f"{name} did not move in {self._steps} steps")
        _stop_if(problems)

    def _expected(self, part: NamedPart) -> bool:
        """Whether a parameter must have trained.

        An expert that no token chose has not; the gradient of what lies before its zero-initialised weights appears at
        the second visit; and in the last layer only tokens that predict a label carry a gradient, so that an expert
        chosen by speech tokens alone rightly has none.
        """
        layer = part.sharing.layer
        if part.index is None or layer is None:
            return True
        visits_E = self._visits.get(layer)
        return layer < self._model.config.num_layers - 1 and visits_E is not None and bool(visits_E[part.index] >= 2)

    def _frozen(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, the parameter (of an encoder maybe a buffer: statistics move too) that holds it, and its numbers."""
        for number, chunk in enumerate(self._model.parts()):
            for name, parameter in chunk.llm.named_parameters():
                if not parameter.requires_grad:
                    yield f"chunk {number}: {name}", parameter, parameter
        for part in self._model.own_parts():
            if not part.parameter.requires_grad:
                yield part.label, part.parameter, part.value
        for stream, encoder in self._encoders.items():
            for name, value in encoder.state_dict(keep_vars=True).items():
                if value.is_floating_point() and not value.requires_grad:
                    yield f"{stream}_encoder: {name}", value, value

    def _frozen_checksums(self) -> dict[str, int]:
        return {name: checksum(values) for name, _, values in self._frozen()}


def _stacked_shape(part: NamedPart) -> list[int]:
    """The shape that a checkpoint has of the tensor that a part is of."""
    return [*([] if part.sharing.experts is None else [part.sharing.experts]), *part.whole_shape]


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A sum over a tensor's bits that changes with any of them and with their order (not cryptographic)."""
    bits = tensor.detach().contiguous().view(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    total = 0
    for number, part in enumerate(bits.split(CHUNK)):
        weights = torch.arange(1, part.numel() + 1, device=part.device)
        total = (total * 31 + number + int((part.long() * weights).sum())) % (1 << 61)
    return total


def _stop_if(problems: Sequence[str]) -> None:
    """Stop all ranks if any of them has found a problem."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, list(problems))
    distinct = list(dict.fromkeys(problem for part in found for problem in part))
    if distinct:
        more = f" (and {len(distinct) - 3} more)" if len(distinct) > 3 else ""
        raise UserError(f"trainability ledger: {'; '.join(distinct[:3])}{more}.")
