"""Show what is in a checkpoint, and check every byte of it.

    mome-dist inspect runs/quickstart                            its newest checkpoint
    mome-dist inspect runs/quickstart --tensors 'model/mome.0.*'

Exit code 2 if anything is missing or damaged, with one line that names it.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Sequence
from typing import Any

from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.quiet import quiet_libraries
from mome_dist.trained import place_argument


def _origin(index: dict[str, Any]) -> dict[str, str]:
    """How a checkpoint came about: by training, or as the mean of others."""
    if "averaged" in index:
        return {"mean of": ", ".join(f"step {source['step']:,}" for source in index["averaged"]) + "; no optimiser"}
    layout = {key: value for key, value in index["written_by"]["layout"].items() if value is not None}
    layout["zero"], seen = index["written_by"]["zero"], index["data"]["utterances_seen"]
    return {
        "steps": f"{index['step']:,} ({index['optimizer_steps']:,} of the optimiser, {index['optimizer']})",
        "utterances seen": "not known" if seen is None else f"{seen:,}",
        "order of utterances": ", ".join(f"{name} {value}" for name, value in index["data"]["order"].items()),
        "written by": ", ".join(f"{name} {value}" for name, value in layout.items()),
    }


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("inspect", __doc__)
    parser.add_argument("checkpoint", type=place_argument, help="a checkpoint, or a run: then its newest one")
    parser.add_argument(
        "--tensors", metavar="PATTERN", help="also list the tensors whose names match, such as 'model/*'"
    )
    parser.add_argument("--no-check", action="store_true", help="only show: do not read and hash the files")
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = command_line().parse_args(arguments)
    quiet_libraries()
    from rich.console import Console
    from rich.table import Table

    from mome_dist.checkpoint.format import CheckpointReader, find_checkpoint
    from mome_dist.checkpoint.inspect import check, kinds_of, tensors_of

    directory = find_checkpoint(options.checkpoint)
    with CheckpointReader(directory) as reader:
        index = reader.index
    console = Console(highlight=False)
    facts = Table(title=str(directory), show_header=False, title_justify="left")
    facts.add_column()
    facts.add_column(overflow="fold")  # hashes are shown whole
    for key, value in {
        **_origin(index),
        "versions": ", ".join(f"{name} {value}" for name, value in index["versions"].items()),
        **{f"frozen {name}": value for name, value in index["frozen"].items()},
        "content": index["content"],
    }.items():
        facts.add_row(key, value)
    console.print(facts)
    kinds = Table("kind", "tensors", "elements", "MB")
    for kind in kinds_of(index):
        kinds.add_row(kind.name, f"{kind.tensors:,}", f"{kind.elements:,}", f"{kind.bytes / 1e6:,.2f}")
    console.print(kinds)
    if options.tensors:
        listed = Table("tensor", "dtype", "shape", "parts")
        for tensor in tensors_of(index):
            if fnmatch.fnmatchcase(tensor.name, options.tensors):
                listed.add_row(tensor.name, tensor.dtype, str(list(tensor.shape)), str(tensor.parts))
        console.print(listed)
    for line in [] if options.no_check else check(directory):
        console.print(f"[green]right:[/] {line}")


if __name__ == "__main__":
    sys.exit(main())
