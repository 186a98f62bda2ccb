"""Encode a corpus once through a run's frozen encoders; training then reads the features and encodes nothing.

    mome-dist prepare features experiment=quickstart
    mome-dist launch --nproc 2 prepare features experiment=quickstart --output features/quickstart

Features go into the cache, or into --output DIR, which runs read with data.features_dir=DIR: a folder that others can
share. They are known by the corpus and by the encoder's weights, so a folder may hold those of many. What is there is
not encoded again, and an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, add_overrides, command_parser, main_guard
from mome_dist.config import load_config
from mome_dist.config.derived import encoder_sections, refuse_lora
from mome_dist.config.models import settle_models
from mome_dist.config.values import check_values
from mome_dist.preflight import check_encoders
from mome_dist.quiet import quiet_libraries

WIDTH = 120  # columns where there is no terminal to ask


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("prepare features", __doc__)
    parser.add_argument("--output", type=Path, metavar="DIR", help="where features go (data.features_dir, the cache)")
    parser.add_argument("--split", action="append", metavar="NAME", help="a split (those that training reads)")
    add_overrides(parser)
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Check the configuration, then encode with all ranks."""
    options = command_line().parse_intermixed_args(arguments)
    config = load_config(options.overrides)
    check_values(config)
    settle_models(config, encoder_sections(config))
    check_encoders(config)
    refuse_lora(config, "the features of an encoder that trains change with every step")
    if options.output is not None:
        config.data.features_dir = str(options.output)

    quiet_libraries()
    from rich.console import Console

    from mome_dist.parallel.plain_world import open_world
    from mome_dist.training.caching import cache_features

    with open_world(config.parallel.timeout_seconds) as world:
        console = Console(quiet=world.rank > 0, highlight=False)
        if not console.is_terminal:
            console = Console(quiet=world.rank > 0, highlight=False, width=WIDTH)
        cache_features(config, options.split, world, console)


if __name__ == "__main__":
    sys.exit(main())
