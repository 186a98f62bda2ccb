"""A layer's router from its description."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from mome_dist.moe.routers.base import Router
from mome_dist.moe.routers.registry import ROUTERS
from mome_dist.moe.routers.spec import RouterSpec


def build_router(spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> Router:
    """The router of one layer, without values (`Router.initialize` sets them).

    Args:
        hidden_size, experts, top_k: H, Nr and K of the paper.
    """
    module, _, name = ROUTERS[spec.name].router.partition(":")
    return cast(Router, getattr(import_module(module), name)(spec, hidden_size, experts, top_k))
