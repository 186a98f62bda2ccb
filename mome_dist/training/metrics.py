"""What a run writes while it trains: ``metrics.jsonl``, ``routing.jsonl``, TensorBoard, and if asked
``conflicts.jsonl`` and W&B.

A line of ``routing.jsonl`` has the counts since the line before: ``tokens``, ``positions`` (dead ones included), and
``asked`` and ``dropped`` routes [layers][experts]. At every checkpoint it also has ``by_view``, the same by task and
rates since the last checkpoint: it is the larger part, and a resume continues from checkpoints only, so that the lines
of a run add up to all its steps however often it was interrupted.

With a mixture of projectors, every tenth line of a step has ``projector_experts``, the share of each expert in the
routes of its router since the one before.

Only rank 0 writes; every number it is given is already reduced over all ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils.tensorboard import SummaryWriter

from mome_dist.config import RunConfig
from mome_dist.config.derived import views_of
from mome_dist.errors import UserError
from mome_dist.files import write_text
from mome_dist.model.distributed import DistributedMoME
from mome_dist.moe.statistics import RoutingCounts
from mome_dist.text_files import split_lines
from mome_dist.training.wandb_log import WandbRun
from mome_dist.training_log import CONFLICTS


class Metrics:
    """Writes the numbers of a run; on ranks above 0 it does nothing."""

    def __init__(self, config: RunConfig, start: int) -> None:
        self._board: SummaryWriter | None = None
        self._wandb: WandbRun | None = None
        self._since_checkpoint: RoutingCounts | None = None
        if dist.get_rank() != 0:
            return
        self._folder = Path(config.output_dir)
        for name in ("metrics.jsonl", "routing.jsonl", CONFLICTS):
            keep_until(self._folder / name, start)
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start)
        if config.training.wandb_project:
            self._wandb = WandbRun(config)

    def step(self, record: dict[str, Any]) -> None:
        """Log one step (``step``, ``loss``, ``views``, ...) or one validation (``step``, ``validation``).

        ``loss`` is the mean over the views of the step, each times the weight of its task; ``views`` and ``validation``
        have the loss of each view without weights. ``sink_loss``, where it is part of the objective, is the mean
        squared cosine without its coefficient; ``route_kl`` and ``logit_kl``, likewise, what each coarse view diverges
        from the fine one that teaches it.
        """
        if self._board is None:
            return
        self._append("metrics.jsonl", record)
        flat = {
            f"{key}/{name}" if isinstance(value, dict) else f"train/{key}": number
            for key, value in record.items()
            if key not in ("step", "utterances")
            for name, number in (value.items() if isinstance(value, dict) else [("", value)])
        }
        self._scalars(record["step"], flat)

    def skipped(self, step: int, ids: Sequence[str]) -> None:
        """Log a step that was not taken, and its utterances."""
        if self._board is not None:
            self._append("metrics.jsonl", {"step": step, "skipped": list(ids)})

    def routing(self, step: int, counts: RoutingCounts, by_view: bool) -> None:
        """Log what the routers did since the last call; ``by_view`` for every step that saves a checkpoint."""
        if self._board is None:
            return
        record = {"step": step, **counts.record()}
        if self._since_checkpoint is not None:
            counts = self._since_checkpoint + counts
        self._since_checkpoint = None if by_view else counts
        if by_view:
            record["by_view"] = counts.by_view()
        self._append("routing.jsonl", record)
        self._scalars(step, _routing_scalars(record))

    def conflicts(self, step: int, found: Mapping[str, Any] | None) -> None:
        """Log how the gradients of a step's views agree (`mome_dist.training.conflict`), if there are two."""
        if self._board is None or found is None:
            return
        self._append(CONFLICTS, {"step": step, **found})
        of_router = [cosine for by_layer in found["router"] for cosine in by_layer if cosine is not None]
        of_experts = [c for by_layer in found["experts"] for row in by_layer for c in row if c is not None]
        means = {"router": of_router, "experts": of_experts}
        self._scalars(step, {f"conflicts/cosine_{name}": fmean(values) for name, values in means.items() if values})

    def close(self) -> None:
        """Flush everything."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        # In one write: a run that is killed leaves at most one line unfinished.
        with (self._folder / name).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        assert self._board is not None
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step)


def gather_routing(model: DistributedMoME, config: RunConfig) -> RoutingCounts:
    """Counts of all layers and ranks since the last call; every rank calls it.

    What a module counts is already the sum over the ranks that hold other tokens, so only the layers of the other
    pipeline stages are missing.
    """
    views = tuple(str(view) for view in views_of(config))
    shape = (len(views), model.config.num_layers, 2 * config.mome.routed_experts + 2)
    packed_VLX = torch.zeros(shape, dtype=torch.int64, device=next(model.parameters()).device)
    for chunk in model.parts():
        for view, counts_LX in chunk.statistics.take().items():
            packed_VLX[views.index(view), list(chunk.momes)] = counts_LX
    dist.all_reduce(packed_VLX, group=parallel_state.get_pipeline_model_parallel_group())
    return RoutingCounts(views, packed_VLX.cpu())


def _routing_scalars(record: dict[str, Any]) -> dict[str, float]:
    """Figures of a line of ``routing.jsonl``: of each layer, and their means."""
    asked_LE = torch.tensor(record["asked"], dtype=torch.float64)
    dropped_L = torch.tensor(record["dropped"], dtype=torch.float64).sum(dim=1)
    routes_L = asked_LE.sum(dim=1).clamp(min=1)
    share_LE = asked_LE / routes_L[:, None]
    experts = share_LE.shape[1]
    entropy_L = torch.special.entr(share_LE).sum(dim=1) / math.log(max(experts, 2))
    by_layer = {
        "load_max_over_mean": share_LE.max(dim=1).values * experts,
        "normalized_entropy": entropy_L,
        "drop_rate": dropped_L / routes_L,
    }
    scalars = {f"routing/{name}": float(values_L.mean()) for name, values_L in by_layer.items()}
    scalars |= {
        f"routing_{name}/layer_{layer:02d}": value
        for name, values_L in by_layer.items()
        for layer, value in enumerate(values_L.tolist())
    }
    scalars["routing/tokens"] = float(record["tokens"])
    scalars["routing/padding_share"] = 1 - record["tokens"] / max(record["positions"], 1)
    return scalars


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run trains again, and a last line that a killed run left unfinished.

    Raises:
        UserError: for any other line that is no record; nothing is dropped then.
    """
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    whole, _, _torn = text.rpartition("\n")
    kept = []
    for number, line in enumerate(split_lines(whole), 1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number} is no record ({error}): remove the line, or the file.") from error
    write_text(path, "".join(f"{line}\n" for line in kept) if step else "")
