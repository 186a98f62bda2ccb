"""Export a trained run as an adapter: a directory that needs nothing else of the run.

    mome-dist export runs/quickstart exports/quickstart
    mome-dist export runs/quickstart/checkpoints/step-000160 exports/quickstart-160 --license cc-by-4.0

It holds the trained weights (safetensors), config.json, a model card and SHA256SUMS, and is loaded by
`mome-dist transcribe DIR FILE`, `mome-dist evaluate DIR output=OUT` and, in Python, `mome_dist.load(DIR)` or, after
`import mome_dist`, transformers' `AutoModel.from_pretrained(DIR)`. An export of before transformers knew them, in the
place of a run, is written anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, add_frozen_options, command_parser, frozen_of, main_guard
from mome_dist.files import check_absent
from mome_dist.quiet import quiet_libraries
from mome_dist.trained import find_trained, place_argument


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("export", __doc__)
    parser.add_argument(
        "run", type=place_argument, help="run directory, one checkpoint of it, or an export in the older form"
    )
    parser.add_argument("target", type=Path, help="directory to make; it must not exist")
    parser.add_argument(
        "--license", metavar="ID", help="of the trained weights, for the model card, as the hub names it (apache-2.0)"
    )
    add_frozen_options(parser)
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Export and say what was written."""
    options = command_line().parse_args(arguments)
    find_trained(options.run)
    check_absent(options.target, "an export")

    quiet_libraries()
    from rich.console import Console

    from mome_dist.export.adapter import export_adapter
    from mome_dist.progress import stages

    console = Console(highlight=False)
    with stages(console, f"checking and exporting {options.run}"):
        document = export_adapter(options.run, options.target, frozen_of(options), options.license)
    console.print(
        f"{options.target}: {document['name']}, step {document['step']}, "
        f"{document['parameters']['trained']:,} trained parameters, {', '.join(document['views'])}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
