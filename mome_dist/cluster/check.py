"""The check itself: every rank reports, links and rates are measured, and what differs between nodes is named."""

from __future__ import annotations

import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mome_dist.cluster.facts import describe_rank
from mome_dist.cluster.links import measure_links, ranks_by_node
from mome_dist.cluster.rates import Rates, measure_rates, synchronize
from mome_dist.parallel.plain_world import World, open_world

EXCHANGES = 20  # of the time of day; the quickest one counts
SHARED_WAIT_SECONDS = 10.0  # a network file system may show a new file late


@dataclass(frozen=True)
class Limits:
    """What is taken for a fault.

    Attributes:
        clock: seconds by which a node's clock may differ from the first node's.
        link: a pair slower than this share of its class's median is slow.
        rate: a node that computes at less than this share of the median rate is slow.
    """

    clock: float = 1.0
    link: float = 0.5
    rate: float = 0.7


def check_cluster(shared: Path, limits: Limits, timeout_seconds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Check the nodes of this world; every rank calls it and gets the same record.

    Args:
        shared: a folder that all nodes should share.
        say: called with what is done next, on rank 0.

    Returns:
        JSON-serialisable: ``ranks`` (reports), ``nodes``, ``ranks_per_node``, ``device``, ``cores``, ``memory_bytes``,
        ``rates`` (the slowest rank's), ``grouped_products`` (of bf16, in one kernel), ``links`` and ``problems``
        (sentences; empty if all is well).
    """
    with open_world(timeout_seconds) as world:
        report = describe_rank(world.device)
        say("clocks and shared storage")
        report["clock_seconds"] = _clock_offset(world)
        report["sees_shared"] = _sees_shared(world, shared)
        nodes = [str(node) for node in _gathered(world, report["node"])]
        say("rates of ranks")
        report["rates"] = _rates_in_turn(world, nodes, report["hardware"]["cores"]).record()
        say("links")
        links = measure_links(nodes, world.device) if world.size > 1 else {}
        reports = _gathered(world, report)
    by_node = ranks_by_node(nodes)
    first = reports[0]
    return {
        "device": world.device.type,
        "nodes": len(by_node),
        "ranks_per_node": max(map(len, by_node.values())),
        "cores": min(each["hardware"]["cores"] for each in reports),
        "memory_bytes": min(each["memory_bytes"] for each in reports),
        "rates": {
            name: (max if name == "call" else min)(each["rates"][name] for each in reports) for name in first["rates"]
        },
        "grouped_products": all(each["hardware"].get("grouped_products", False) for each in reports),
        "links": links,
        "problems": list(find_problems(reports, links, shared, limits)),
        "ranks": reports,
    }


def find_problems(
    reports: Sequence[Mapping[str, Any]], links: Mapping[str, Any], shared: Path, limits: Limits
) -> Iterator[str]:
    """Sentences that name the node and what is wrong with it."""
    by_node = ranks_by_node([report["node"] for report in reports])
    firsts = {node: reports[ranks[0]] for node, ranks in by_node.items()}
    sizes = Counter(len(ranks) for ranks in by_node.values())
    for node, ranks in by_node.items():
        usual = sizes.most_common(1)[0][0]
        if len(ranks) != usual:
            yield f"node {node} has {len(ranks)} ranks, most nodes have {usual}: start the same number on every node."
    for section in ("software", "hardware"):
        yield from _unlike(firsts, section)
    for node, report in firsts.items():
        offset = report["clock_seconds"]
        if abs(offset) > limits.clock:
            yield (
                f"node {node}'s clock is {abs(offset):.2f} s {'ahead of' if offset > 0 else 'behind'} the first "
                f"node's (limit {limits.clock:g} s): start its time service (chronyd, ntpd)."
            )
    for node, ranks in by_node.items():
        if not all(reports[rank]["sees_shared"] for rank in ranks):
            yield (
                f"node {node} does not see a file that rank 0 wrote to {shared}: give --shared (and output_dir) on a "
                "file system that all nodes mount."
            )
    for name in ("bf16_flops", "memory_bytes"):
        rates = {node: min(reports[rank]["rates"][name] for rank in ranks) for node, ranks in by_node.items()}
        usual_rate = statistics.median(rates.values())
        for node, rate in rates.items():
            if rate < limits.rate * usual_rate:
                yield (
                    f"node {node} reaches {rate / usual_rate:.0%} of the usual {name} ({rate:.3g} of {usual_rate:.3g} "
                    "a second): look for another job, heat or a power limit on it."
                )
    for name, link in links.items():
        usual_link = statistics.median(pair["bytes_per_second"] for pair in link["pairs"])
        for pair in link["pairs"]:
            if pair["bytes_per_second"] < limits.link * usual_link:
                ends = " and ".join(f"rank {rank} (node {reports[rank]['node']})" for rank in pair["ranks"])
                yield (
                    f"the link between {ends} is slow: {pair['bytes_per_second'] / 1e9:.3g} GB/s, {name} nodes "
                    f"{usual_link / 1e9:.3g} GB/s is usual."
                )


def _unlike(firsts: Mapping[str, Mapping[str, Any]], section: str) -> Iterator[str]:
    """What differs in a section of the reports, by node."""
    for key in sorted({key for report in firsts.values() for key in report[section]}):
        values = {node: report[section].get(key, "missing") for node, report in firsts.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        for node, value in values.items():
            if value != usual:
                yield (
                    f"node {node} has {key} {value}, the others have {usual} "
                    f"(it runs {firsts[node]['executable']}, code in {firsts[node]['code']})."
                )


def _gathered(world: World, value: Any) -> list[Any]:
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def _clock_offset(world: World) -> float:
    """Seconds by which this rank's clock is ahead of rank 0's, by the quickest exchange (Cristian 1989)."""
    offset = 0.0
    for other in range(1, world.size):
        if world.rank not in (0, other):
            continue
        message, best = torch.zeros(1, dtype=torch.float64, device=world.device), torch.inf
        for _ in range(EXCHANGES):
            if world.rank == 0:
                dist.recv(message, other)
                message.fill_(time.time())
                dist.send(message, other)
                continue
            began = time.perf_counter()
            dist.send(message, 0)
            dist.recv(message, 0)
            there = float(message)
            way = time.perf_counter() - began
            if way < best:
                best, offset = way, time.time() - way / 2 - there
    return offset


def _sees_shared(world: World, shared: Path) -> bool:
    """Whether this rank reads what rank 0 writes into a folder."""
    token = [secrets.token_hex(8)]
    if world.size > 1:
        dist.broadcast_object_list(token, src=0)
    file = shared / f".check-{token[0]}"
    with _written(file, token[0]) if world.rank == 0 else nullcontext():
        world.barrier()
        seen, until = False, time.monotonic() + SHARED_WAIT_SECONDS
        while not seen and time.monotonic() < until:
            seen = file.is_file() and file.read_text(encoding="utf-8") == token[0]
            if not seen:
                time.sleep(0.2)
        world.barrier()
    return seen


@contextmanager
def _written(file: Path, text: str) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _rates_in_turn(world: World, nodes: Sequence[str], cores: int) -> Rates:
    """Rates of this rank while it has a core to itself: where processes share cores, they take turns."""
    place = ranks_by_node(nodes)[nodes[world.rank]].index(world.rank)
    at_once = max(cores, 1) if world.device.type == "cpu" else world.size
    turns = -(-max(map(len, ranks_by_node(nodes).values())) // at_once)
    measured: Rates | None = None
    for turn in range(turns):
        world.barrier()
        if place // at_once == turn:
            measured = measure_rates(world.device)
            synchronize(world.device)
    world.barrier()
    assert measured is not None
    return measured
