"""The layouts that are verified unless a user names others: every axis alone, then together, up to eight processes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from mome_dist.moe.routers.spec import PLAIN, RouterSettings
from mome_dist.parallel.layout import Layout
from mome_dist.verification.run import Case

_DISPATCH = re.compile(",? (all-to-all|local|gather)")


def _case(name: str, world: int, zero: int = 1, dispatch: str = "alltoall", **settings: Any) -> Case:
    other = {key: settings.pop(key) for key in ("placement", "precision", "train_projectors") if key in settings}
    return Case(name, Layout.for_world(world, **settings), zero, dispatch, **other)


def standard_cases(experts: bool = True, beside: bool = False, router: RouterSettings = PLAIN.settings) -> list[Case]:
    """At least one case for every axis and every pair of them that meets in the code.

    Args:
        experts: whether the model has any; without, the cases that differ in nothing else are left out.
        beside: whether, without experts, anything trains beside the projectors, so that these may be kept.
        router: of the experts; cases that it does not serve are left out.
    """
    if experts:
        return [case for case in _cases() if router.serves(case.dispatch, case.layout.sequence_parallel)]
    left = (case for case in _cases() if case.layout.ep == 1 and case.placement is None)
    left = (case for case in left if beside or case.train_projectors is not False)  # something must train
    found = {(case.layout, case.zero, case.precision, case.train_projectors): case for case in left}
    return [dataclasses.replace(case, name=_DISPATCH.sub("", case.name)) for case in found.values()]


def _cases() -> list[Case]:
    return [
        _case("one process, all-to-all", 1),
        _case("one process, local", 1, dispatch="local"),
        _case("dp2 zero0", 2, zero=0),
        _case("dp2 zero1", 2),
        _case("dp2 zero2", 2, zero=2),
        _case("ep2 zero0", 2, zero=0, ep=2),
        _case("ep2", 2, ep=2),
        _case("ep2 gather", 2, ep=2, dispatch="gather"),
        _case("ep4 zero2", 4, zero=2, ep=4),
        _case("ep4 gather zero2", 4, zero=2, ep=4, dispatch="gather"),
        _case("dp4 ep2", 4, ep=2),
        _case("dp4 ep2 gather", 4, ep=2, dispatch="gather"),
        _case("tp2", 2, tp=2),
        _case("tp2 zero0", 2, zero=0, tp=2),
        _case("tp2 sp", 2, tp=2, sequence_parallel=True),
        _case("tp2 sp local zero0", 2, zero=0, tp=2, sequence_parallel=True, dispatch="local"),
        _case("pp2", 2, pp=2),
        _case("pp2 zero0", 2, zero=0, pp=2),
        _case("pp4", 4, pp=4),
        _case("pp2, stages of 1 and 3 layers", 2, pp=2, stage_layers=(1, 3)),
        _case("pp2, last stage without layers", 2, pp=2, stage_layers=(4, 0)),
        _case("pp2 interleaved", 2, pp=2, virtual=2),
        _case("recompute full", 1, recompute="full"),
        _case("recompute selective", 1, recompute="selective"),
        _case("pp2 recompute full gather", 2, pp=2, recompute="full", dispatch="local"),
        _case("tp2 pp2", 4, tp=2, pp=2),
        _case("tp2 pp2 zero2", 4, zero=2, tp=2, pp=2),
        _case("tp2 ep2 sp", 4, tp=2, ep=2, sequence_parallel=True),
        _case("tp2 ep2 sp gather", 4, tp=2, ep=2, sequence_parallel=True, dispatch="gather"),
        _case("pp2 ep2 interleaved", 4, pp=2, ep=2, virtual=2),
        _case("tp2 pp2 ep2 zero0", 8, zero=0, tp=2, pp=2, ep=2),
        _case("tp2 pp2 ep2 zero1", 8, tp=2, pp=2, ep=2),
        _case("tp2 pp2 ep2 zero2", 8, zero=2, tp=2, pp=2, ep=2),
        _case(
            "tp2 pp2 ep2 sp gather recompute interleaved",
            8,
            zero=2,
            dispatch="gather",
            tp=2,
            pp=2,
            ep=2,
            virtual=2,
            sequence_parallel=True,
            recompute="full",
        ),
        _case("placement mhsa, tp2 ep2", 4, tp=2, ep=2, placement="mhsa"),
        _case("placement ffn, tp2 ep2 sp", 4, tp=2, ep=2, sequence_parallel=True, placement="ffn"),
        _case("placement layer, tp2 pp2", 4, tp=2, pp=2, placement="layer"),
        _case("projectors frozen, recompute full", 1, recompute="full", train_projectors=False),
        _case(
            "projectors frozen, tp2 ep2 sp gather",
            4,
            1,
            "gather",
            tp=2,
            ep=2,
            sequence_parallel=True,
            train_projectors=False,
        ),
        _case("projectors frozen, first stage without layers", 2, pp=2, stage_layers=(0, 4), train_projectors=False),
        _case("bf16, one process", 1, dispatch="local", precision="bf16"),
        _case("bf16, tp2 pp2", 4, tp=2, pp=2, precision="bf16"),
        _case("bf16, tp2 ep2 sp gather", 4, dispatch="gather", tp=2, ep=2, sequence_parallel=True, precision="bf16"),
    ]
