"""The optimiser of a configuration, its schedule, and what DeepSpeed is told of them; no process group here, so that
tools can ask too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mome_dist import nvidia_apex
from mome_dist.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of a step (counted from zero): linear warm-up, then a cosine down to ``final_fraction`` of the peak."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = min(1.0, max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    cosine = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * warm * cosine


def make_optimizer(groups: Iterable[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser over parameter groups (dictionaries with at least ``params``); AdamW is Apex's where it can be."""
    groups = list(groups)
    if config.name == "adamw":
        settings: dict[str, Any] = {
            "lr": config.learning_rate,
            "betas": (config.betas[0], config.betas[1]),
            "eps": config.epsilon,
            "weight_decay": config.weight_decay,
        }
        apex = nvidia_apex.fused_adam()
        device = next(parameter.device for group in groups for parameter in group["params"])
        if apex is not None and nvidia_apex.runs_on(device):
            return apex(groups, adam_w_mode=True, **settings)
        return torch.optim.AdamW(groups, fused=True, **settings)
    return torch.optim.SGD(groups, lr=config.learning_rate)


def moment_names(config: OptimizerConfig) -> tuple[str, ...]:
    """Names of the optimiser's running averages; SGD without momentum has none."""
    return ("exp_avg", "exp_avg_sq") if config.name == "adamw" else ()


def zero_stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def deepspeed_settings(settings: Mapping[str, Any], config: OptimizerConfig) -> dict[str, Any]:
    """A plain DeepSpeed configuration with batch sizes and clipping filled in, as the engine gets it."""
    return dict(settings) | {
        # Microbatches, and with them accumulation, belong to the pipeline schedule.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        # Without ZeRO, DeepSpeed's norm leaves out other pipeline stages and expert ranks: see `Engine._clip`.
        "gradient_clipping": config.gradient_clipping if zero_stage(settings) else 0.0,
    }
