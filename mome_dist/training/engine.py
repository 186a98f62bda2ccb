"""The coupling: Megatron-Core's schedule computes gradients, a DeepSpeed engine reduces them and steps.

The engine is given the trainable modules only. Gradients are accumulated on the bare model by the pipeline schedule; the
engine then averages shared parameters over data-parallel ranks and experts over the ranks that hold the same experts,
clips by the global norm, and steps the (ZeRO-partitioned) optimiser. Trainable parameters are fp32 throughout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state
from torch import nn

from mome_dist.config.schema import OptimizerConfig
from mome_dist.parallel.mpu import MegatronMPU


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of a step (counted from zero): linear warm-up, then a cosine down to ``final_fraction`` of the peak."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = min(1.0, max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    cosine = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * warm * cosine


def _parameter_groups(modules: nn.Module) -> list[dict[str, Any]]:
    """One group of shared parameters and one of experts.

    ZeRO sums the gradient norm over pipeline stages group by group, so every stage must have the same groups.
    """
    return split_params_into_different_moe_groups_for_optimizer({"name": "shared", "params": list(modules.parameters())})


class Engine:
    """Gradient reduction, clipping and optimiser step for one rank.

    Args:
        modules: the trainable modules of this rank.
        config: optimiser settings.
        deepspeed_file: a plain DeepSpeed JSON config; batch sizes and clipping are filled in here.
    """

    def __init__(self, modules: nn.ModuleDict, config: OptimizerConfig, deepspeed_file: Path) -> None:
        self._modules, self._config = modules, config
        groups = _parameter_groups(modules)
        if config.name == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                groups,
                lr=config.learning_rate,
                betas=(config.betas[0], config.betas[1]),
                weight_decay=config.weight_decay,
            )
        else:
            optimizer = torch.optim.SGD(groups, lr=config.learning_rate)
        settings = json.loads(deepspeed_file.read_text())
        self.zero_stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        settings |= {
            # Microbatches, and with them accumulation, belong to the pipeline schedule.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            # Without ZeRO, DeepSpeed's norm leaves out other pipeline stages and expert ranks: see `_clip`.
            "gradient_clipping": config.gradient_clipping if self.zero_stage else 0.0,
        }
        self.deepspeed, *_ = deepspeed.initialize(model=modules, optimizer=optimizer, config=settings, mpu=MegatronMPU())
        self.gradient_norm = 0.0

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside add up local gradients; leaving the block reduces them over ranks."""
        if self.zero_stage:
            with self.deepspeed.coalesce_grad_reduction():
                yield
        else:
            yield
            self.deepspeed.allreduce_gradients()

    def step(self, rate: float) -> None:
        """Clip by the global norm, step at this learning rate, and clear the gradients."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate
        if not self.zero_stage:
            self.gradient_norm = self._clip()
        self.deepspeed.step()
        if self.zero_stage:
            self.gradient_norm = float(self.deepspeed.get_global_grad_norm() or 0.0)

    def _clip(self) -> float:
        """Scale local gradients so that the norm over all distinct parameters of the model is at most the limit."""
        squares = torch.zeros(2)
        gradients = []
        for parameter in self._modules.parameters():
            if parameter.grad is not None:
                gradients.append(parameter.grad)
                squares[int(is_moe_param(parameter))] += parameter.grad.float().square().sum().cpu()
        shared, experts = squares.to(next(self._modules.parameters()).device)
        dist.all_reduce(experts, group=_expert_group(self._modules))
        total = shared + experts
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        norm = float(total.sqrt())
        limit = self._config.gradient_clipping
        if limit and norm > limit:
            for gradient in gradients:
                gradient.mul_(limit / norm)
        return norm


def _expert_group(modules: nn.Module) -> dist.ProcessGroup:
    name = next(parameter.group_name for parameter in modules.parameters() if is_moe_param(parameter))
    return deepspeed_groups._get_expert_parallel_group(name)
