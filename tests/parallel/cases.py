"""Layouts to verify, in few words."""

from __future__ import annotations

from typing import Any

from mome_dist.parallel.layout import Layout
from mome_dist.verification.run import Case

SP: dict[str, Any] = {"tp": 2, "sequence_parallel": True}


def case(name: str, world: int, zero: int = 1, dispatch: str = "local", **layout: Any) -> Case:
    """A case of this name; ``layout`` as of `Layout.for_world`."""
    return Case(name, Layout.for_world(world, **layout), zero, dispatch)


def by_name(*cases: Case) -> dict[str, Case]:
    """Cases by their names."""
    return {each.name: each for each in cases}
