"""How fast ranks reach each other, inside a node and between nodes: pairs of ranks, and all at once.

Pairs find a slow cable or card; the all-to-all, in which every rank sends at the same time, is what training gets and
what the planner and the dispatch reckon with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mome_dist.cluster.rates import synchronize

SMALL_BYTES, CPU_BYTES, GPU_BYTES = 64, 4_000_000, 64_000_000
REPEATS, ROUNDS = 10, 3


@dataclass(frozen=True)
class Speed:
    """Bytes a second that one rank sends, and seconds of an exchange of nearly nothing."""

    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class PairSpeed:
    """Speed between two ranks."""

    ranks: tuple[int, int]
    speed: Speed


def ranks_by_node(nodes: Sequence[str]) -> dict[str, list[int]]:
    """Ranks of every node, in the order of their first rank, from the node of every rank."""
    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    return ranks


def pairs_of(nodes: Sequence[str]) -> dict[str, list[list[tuple[int, int]]]]:
    """Pairs to measure by link class, in turns whose pairs have no rank in common.

    Inside a node every rank meets its neighbours; between nodes the first rank of each node meets those of the
    neighbouring nodes, in a ring.
    """
    by_node = ranks_by_node(nodes)
    inside = [pair for ranks in by_node.values() for pair in pairwise(ranks)]
    first = [ranks[0] for ranks in by_node.values()]
    between = list(pairwise(first))
    if len(first) > 2:
        between.append((first[0], first[-1]))
    return {name: _turns(pairs) for name, pairs in (("inside", inside), ("between", between)) if pairs}


def _turns(pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    turns: list[list[tuple[int, int]]] = []
    for pair in pairs:
        free = (turn for turn in turns if not {rank for other in turn for rank in other} & set(pair))
        turn = next(free, None)
        if turn is None:
            turns.append([pair])
        else:
            turn.append(pair)
    return turns


def groups_of(nodes: Sequence[str]) -> dict[str, list[list[int]]]:
    """Groups that exchange all-to-all by link class: the ranks of each node; the n-th ranks of all nodes."""
    by_node = ranks_by_node(nodes)
    inside = [ranks for ranks in by_node.values() if len(ranks) > 1]
    most = max(len(ranks) for ranks in by_node.values())
    between = [[ranks[n] for ranks in by_node.values() if n < len(ranks)] for n in range(most)]
    between = [ranks for ranks in between if len(ranks) > 1]
    return {name: groups for name, groups in (("inside", inside), ("between", between)) if groups}


def measure_links(nodes: Sequence[str], device: torch.device) -> dict[str, dict[str, Any]]:
    """Measure every link class that there is; all ranks of the world call it and get the same figures.

    Returns:
        By class, "inside" and "between": ``bytes_per_second`` and ``latency`` of the all-to-all (the slowest group's),
        and ``pairs``, a list of ranks and their own speed.
    """
    measured = {}
    pairs, groups = pairs_of(nodes), groups_of(nodes)
    for name in pairs:
        exchange = _measure_groups(groups[name], device)
        measured[name] = {
            "bytes_per_second": exchange.bytes_per_second,
            "latency": exchange.latency,
            "pairs": [
                {
                    "ranks": list(pair.ranks),
                    "bytes_per_second": pair.speed.bytes_per_second,
                    "latency": pair.speed.latency,
                }
                for pair in _measure_pairs(pairs[name], device)
            ],
        }
    return measured


def _measure_pairs(turns: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> list[PairSpeed]:
    """A ping-pong between the ranks of every pair, turn by turn."""
    mine: list[PairSpeed] = []
    for turn in turns:
        dist.barrier()
        for first, second in turn:
            if dist.get_rank() in (first, second):
                speed = _ping_pong(second if dist.get_rank() == first else first, dist.get_rank() == first, device)
                if dist.get_rank() == first:
                    mine.append(PairSpeed((first, second), speed))
    everyone: list[list[PairSpeed] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [pair for found in everyone for pair in found or []]


def _ping_pong(other: int, starts: bool, device: torch.device) -> Speed:
    def exchange(message: Tensor) -> Callable[[], None]:
        def run() -> None:
            for sends in (starts, not starts):
                if sends:
                    dist.send(message, other)
                else:
                    dist.recv(message, other)

        return run

    # A ping-pong is two ways, one after the other.
    return _speed(exchange, device, lambda size: size, 2.0)


def _measure_groups(groups: Sequence[Sequence[int]], device: torch.device) -> Speed:
    """All groups exchange at the same time; the slowest rank counts."""
    group, size = None, 1
    for ranks in groups:
        opened = dist.new_group(list(ranks))  # every rank takes part in opening every group
        if dist.get_rank() in ranks:
            group, size = opened, len(ranks)
    dist.barrier()
    figures = torch.tensor([torch.inf, 0.0], dtype=torch.float64, device=device)
    if group is not None:

        def exchange(message: Tensor) -> Callable[[], None]:
            source = message[: message.numel() - message.numel() % size]
            target = torch.empty_like(source)
            return lambda: dist.all_to_all_single(target, source, group=group)

        speed = _speed(exchange, device, lambda sent: sent * (size - 1) / size, 1.0)
        figures = torch.tensor([speed.bytes_per_second, -speed.latency], dtype=torch.float64, device=device)
        dist.destroy_process_group(group)
    dist.all_reduce(figures, op=dist.ReduceOp.MIN)
    return Speed(float(figures[0]), -float(figures[1]))


def _speed(
    exchange: Callable[[Tensor], Callable[[], None]],
    device: torch.device,
    sent: Callable[[int], float],
    ways: float,
) -> Speed:
    """Latency from small messages, bandwidth from large ones without it; medians of a few rounds.

    Args:
        exchange: makes the operation for a message.
        sent: bytes on the wire for a message of some bytes.
        ways: messages, one after the other, of one operation.
    """
    large_bytes = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    seconds = []
    for size in (SMALL_BYTES, large_bytes):
        run = exchange(torch.zeros(size, dtype=torch.uint8, device=device))
        run()
        rounds = []
        for _ in range(ROUNDS):
            synchronize(device)
            began = time.perf_counter()
            for _ in range(REPEATS):
                run()
            synchronize(device)
            rounds.append((time.perf_counter() - began) / REPEATS / ways)
        seconds.append(statistics.median(rounds))
    small, large = seconds
    return Speed(sent(large_bytes) / max(large - small, 1e-9), small)
