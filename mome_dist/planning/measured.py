"""The machine that a plan is for, as it was measured: by `mome-dist check`, or by a benchmark of one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError
from mome_dist.planning.hardware import (
    GPUS,
    USABLE_SHARE,
    Cluster,
    Link,
    known_gpu,
    public_links,
    runtime_bytes,
)
from mome_dist.text_files import read_json


@dataclass(frozen=True)
class Check:
    """Something that a plan predicts and that was measured.

    Attributes:
        what: in words.
        unit: of both numbers, "ms" or "GB".
        predicted, measured: numbers.
    """

    what: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """How far the prediction is off, as a part of what was measured."""
        return self.predicted / self.measured - 1

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.measured:.3g} {self.unit} measured, {self.predicted:.3g} predicted ({self.error:+.0%})"
        )


def measured_cluster(path: Path, nodes: int | None = None, ranks_per_node: int | None = None) -> Cluster:
    """A cluster from the JSON file that `mome-dist check` wrote, or a benchmark of a GPU (`benchmarks.gpu`); the
    sizes may be another allocation's.

    Raises:
        UserError: if the file is missing or holds no such measurement, or no links where there are several ranks.
    """
    try:
        found = read_json(path)
        return cluster_of_record(found.get("figures", {}).get("cluster", found), path.name, nodes, ranks_per_node)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--measured {path}: is no measurement of mome-dist check or benchmarks.gpu ({error!r}); run it again."
        ) from error


def cluster_of_record(
    found: Mapping[str, Any], name: str, nodes: int | None = None, ranks_per_node: int | None = None
) -> Cluster:
    """A cluster of what `mome_dist.cluster.check.check_cluster` records of one.

    Args:
        name: of the file, for tables and messages.

    Raises:
        UserError: if there are several ranks, whose links were not measured and are not public either.
        KeyError: if the record lacks something.
    """
    rates, on_gpu = found["rates"], found["device"] == "cuda"
    nodes, ranks_per_node = nodes or found["nodes"], ranks_per_node or found["ranks_per_node"]
    inside, between = _links(found, name, nodes * ranks_per_node)
    memory = found["memory_bytes"] * USABLE_SHARE / (1 if on_gpu else ranks_per_node)
    return Cluster(
        name=f"{nodes} x {ranks_per_node} ranks, measured ({name})",
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        memory=memory,
        runtime=runtime_bytes(on_gpu),
        reserves=on_gpu,
        bf16_flops=rates["bf16_flops"],
        fp32_flops=rates["fp32_flops"],
        memory_bytes=rates["memory_bytes"],
        call=rates["call"],
        inside=inside,
        between=between,
        workers=ranks_per_node if on_gpu else min(ranks_per_node, found["cores"]),
        on_gpu=on_gpu,
        grouped_products=found.get("grouped_products", False),
    )


def _links(found: Mapping[str, Any], name: str, ranks: int) -> tuple[Link, Link]:
    """Inside a node and between nodes: as measured, or of a GPU that was measured alone, as public figures have it."""
    measured = found["links"]
    inside = measured.get("inside") or measured.get("between")
    between = measured.get("between") or inside
    if inside is not None:
        return _link(inside), _link(between)
    if ranks == 1:  # there is nothing to send
        alone = Link(found["rates"]["memory_bytes"], 0.0)
        return alone, alone
    known = known_gpu(found.get("gpu", ""))
    if known is None:
        raise UserError(
            f"--measured {name}: was measured on one rank, so it tells nothing of links: run mome-dist check on "
            f"{ranks} ranks, or set --nodes 1 --ranks-per-node 1."
        )
    return public_links(GPUS[known])


def _link(measured: Mapping[str, float]) -> Link:
    return Link(measured["bytes_per_second"], measured["latency"])


def checks_of(path: Path) -> list[Check]:
    """What a benchmark of a GPU found of the planner's own predictions; nothing for a file of another kind."""
    return [Check(**each) for each in read_json(path).get("figures", {}).get("planned", [])]
