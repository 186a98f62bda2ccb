"""The command line of the cluster check: a table of nodes and links, problems in words, JSON for the planner."""

from __future__ import annotations

import argparse
import os
from typing import Any

from rich.console import Console
from rich.table import Table

from mome_dist.cluster.check import Limits, check_cluster
from mome_dist.cluster.links import ranks_by_node
from mome_dist.files import write_json
from mome_dist.progress import stages

PROBLEMS_FOUND = 1
WIDTH = 140  # columns where there is no terminal to ask


def check_command(options: argparse.Namespace) -> int:
    """Check, print on rank 0, write the record; 1 on rank 0 if anything is wrong."""
    rank = int(os.environ.get("RANK", "0"))
    console = Console(quiet=rank != 0, highlight=False)
    if not console.is_terminal:
        console = Console(quiet=rank != 0, highlight=False, width=WIDTH)
    limits = Limits(options.clock_limit, options.link_limit, options.rate_limit)
    with stages(console, "starting") as show:
        record = check_cluster(options.shared, limits, options.timeout, show)
    if rank:
        return 0  # rank 0 speaks for all
    _print(record, console)
    if options.write:
        write_json(options.write, record)
        console.print(f"written to {options.write}")
    return PROBLEMS_FOUND if record["problems"] else 0


def _print(record: dict[str, Any], console: Console) -> None:
    reports = record["ranks"]
    table = Table(title=f"{record['nodes']} nodes, {len(reports)} ranks")
    for heading in ("node", "ranks", "device", "memory GB", "clock s", "bf16 TFLOP/s", "fp32", "memory GB/s", "torch"):
        table.add_column(heading, justify="left" if heading in ("node", "device", "torch") else "right")
    for node, ranks in ranks_by_node([report["node"] for report in reports]).items():
        first, slowest = reports[ranks[0]], {}
        for name in first["rates"]:
            slowest[name] = min(reports[rank]["rates"][name] for rank in ranks)
        hardware = first["hardware"]
        table.add_row(
            node,
            str(len(ranks)),
            f"{hardware['gpus']} x {hardware['gpu']}" if "gpu" in hardware else f"{hardware['cores']} cores",
            f"{first['memory_bytes'] / 1e9:.1f}",
            f"{first['clock_seconds']:+.4f}",
            f"{slowest['bf16_flops'] / 1e12:.3f}",
            f"{slowest['fp32_flops'] / 1e12:.3f}",
            f"{slowest['memory_bytes'] / 1e9:.1f}",
            first["software"]["torch"],
        )
    console.print(table)
    for name, link in record["links"].items():
        pairs = [pair["bytes_per_second"] / 1e9 for pair in link["pairs"]]
        where = "inside a node" if name == "inside" else "between nodes"
        console.print(
            f"{where}: all-to-all {link['bytes_per_second'] / 1e9:.3g} GB/s a rank, {link['latency'] * 1e6:.0f} us; "
            f"pairs {min(pairs):.3g} to {max(pairs):.3g} GB/s"
        )
    for problem in record["problems"]:
        console.print(f"[bold red]problem:[/] {problem}", soft_wrap=True)
    if not record["problems"]:
        console.print("all nodes are alike")
