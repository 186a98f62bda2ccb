"""What a run writes while it trains: ``metrics.jsonl``, ``routing.jsonl``, TensorBoard, and W&B if asked.

Only rank 0 writes; every number it is given is already reduced over all ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mome_dist.config import RunConfig
from mome_dist.errors import UserError
from mome_dist.files import write_text
from mome_dist.parallel.model import DistributedMoME


class Metrics:
    """Writes the numbers of a run; on ranks above 0 it does nothing."""

    def __init__(self, config: RunConfig, start: int) -> None:
        self._board: SummaryWriter | None = None
        self._wandb: Any = None
        if dist.get_rank() != 0:
            return
        self._folder = Path(config.output_dir)
        for name in ("metrics.jsonl", "routing.jsonl"):
            _keep_until(self._folder / name, start)
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start)
        if config.training.wandb_project:
            self._wandb = _start_wandb(config)

    def step(self, record: dict[str, Any]) -> None:
        """Log one step (``step``, ``loss``, ``views``, ...) or one validation (``step``, ``validation``)."""
        if self._board is None:
            return
        self._append("metrics.jsonl", record)
        flat = {
            f"{key}/{name}" if isinstance(value, dict) else f"train/{key}": number
            for key, value in record.items()
            if key != "step"
            for name, number in (value.items() if isinstance(value, dict) else [("", value)])
        }
        self._scalars(record["step"], flat)

    def routing(self, step: int, counts_L2E: Tensor) -> None:
        """Log the routes asked for and dropped, int64 [layers, 2, experts], since the last call."""
        if self._board is None:
            return
        asked_LE, dropped_LE = counts_L2E.unbind(1)
        self._append("routing.jsonl", {"step": step, "asked": asked_LE.tolist(), "dropped": dropped_LE.tolist()})
        share_LE = asked_LE / asked_LE.sum(dim=1, keepdim=True).clamp(min=1)
        entropy_L = -(share_LE * share_LE.clamp(min=1e-12).log()).sum(dim=1)
        self._scalars(
            step,
            {
                "routing/load_max_over_mean": float((share_LE.max(dim=1).values * share_LE.shape[1]).mean()),
                "routing/entropy": float(entropy_L.mean()),
                "routing/drop_rate": float(dropped_LE.sum() / asked_LE.sum().clamp(min=1)),
            },
        )

    def close(self) -> None:
        """Flush everything."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self._folder / name).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        assert self._board is not None
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)


def gather_routing(model: DistributedMoME, layers: int) -> Tensor:
    """Counts of all layers and data-parallel ranks since the last call, int64 [layers, 2, experts]; collective."""
    device = next(model.parameters()).device
    experts = next(iter(model.momes.values())).num_experts
    counts_L2E = torch.zeros(layers, 2, experts, dtype=torch.int64, device=device)
    for number, mome in model.momes.items():
        counts_L2E[number] = mome.statistics.take()
    dist.all_reduce(counts_L2E, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(counts_L2E, group=parallel_state.get_pipeline_model_parallel_group())
    return counts_L2E.cpu()


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run trains again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
    write_text(path, "".join(f"{line}\n" for line in kept) if step else "")


def _start_wandb(config: RunConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "training.wandb_project is set, but wandb is not installed: pip install 'mome_dist[wandb]', or set it to "
            "null."
        ) from error
    return wandb.init(project=config.training.wandb_project, name=config.name, dir=config.output_dir, resume="allow")
