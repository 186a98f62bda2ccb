"""Routers of the registry as closed forms are tested on: 24 experts, hidden states as wide, four pairs of rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mome_dist.config import RunConfig, load_config
from mome_dist.config.derived import router_of
from mome_dist.config.values import check_values
from mome_dist.moe.routers.build import build_router
from mome_dist.moe.routing import Routing

HIDDEN, EXPERTS = 24, 24
VIEWS = ["task.asr_audio_rates=[4,16]", "task.vsr_video_rates=[2]", "task.avsr_audio_rates=[4]"]
VIEWS += ["task.avsr_video_rates=[2]"]


def configured(name: str, top_k: int, *more: str, **settings: Any) -> RunConfig:
    """A run with a router of a registered kind."""
    own = [f"mome.router.{key}={'null' if value is None else value}" for key, value in settings.items()]
    sizes = [f"mome.routed_experts={EXPERTS}", f"mome.top_k={top_k}", "mome.dispatch=auto"]
    config = load_config(["experiment=tiny", f"mome/router={name}", *VIEWS, *sizes, *own, *more])
    check_values(config)
    return config


def build(name: str, top_k: int, *more: str, **settings: Any) -> Any:
    """Its router, with the parameters that its kind has."""
    router = build_router(router_of(configured(name, top_k, *more, **settings)), HIDDEN, EXPERTS, top_k)
    router.initialize("mome.0", 3)
    return router


def normal(*shape: int, seed: int = 0) -> Tensor:
    """fp32, standard normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def experts_used(routing: Routing) -> Tensor:
    """int64 [T], experts that each token uses."""
    return routing.selected_TE().sum(dim=1)
