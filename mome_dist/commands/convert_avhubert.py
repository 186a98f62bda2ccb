"""Make a video encoder of a published AV-HuBERT checkpoint, pre-trained or fine-tuned, without fairseq.

    mome-dist convert avhubert large_vox_iter5.pt
    mome-dist convert avhubert CHECKPOINT.pt --output DIR
    mome-dist convert avhubert STRIPPED.pt --heads 16 --pre-norm

The checkpoint is a pickle; nothing of it but tensors and plain values is loaded, and no code in it runs. What is
written is this project's format (config.json, model.safetensors). Without --output it goes where
`video_encoder=avhubert_base` or `avhubert_large` look for it, in the cache. What no tensor tells and a checkpoint
without its settings does not say has to be given, and config.json records where each setting is from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.errors import UserError
from mome_dist.files import check_absent, check_downloaded, published_directory, sha256_of
from mome_dist.quiet import quiet_libraries

SIZES = {768: "base", 1024: "large"}  # the published widths


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("convert avhubert", __doc__)
    parser.add_argument("checkpoint", type=Path, help="the published file")
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory to make; it must not exist")
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads, where the checkpoint does not say")
    parser.add_argument(
        "--pre-norm",
        action="store_true",
        default=None,
        help="layer norms come first in each layer, as in every published model, where the checkpoint does not say",
    )
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Convert and say what was written."""
    options = command_line().parse_args(arguments)
    check_downloaded(options.checkpoint)
    if options.output is not None:
        check_absent(options.output, "a conversion", "--output")

    quiet_libraries()
    from rich.console import Console

    from mome_dist.paths import cache_root
    from mome_dist.progress import stages
    from mome_dist.speech.avhubert.conversion import convert
    from mome_dist.speech.avhubert.fairseq_file import read_fairseq
    from mome_dist.speech.avhubert.settings import HEADS, PRE_NORM
    from mome_dist.speech.geometry import AVHUBERT

    console = Console(highlight=False, soft_wrap=True)
    with stages(console, f"converting {options.checkpoint}"):
        file = read_fairseq(options.checkpoint)
        given = {HEADS: options.heads, PRE_NORM: options.pre_norm}
        converted = convert(file.tensors, file.settings, given)
        encoder = converted.encoder
        target = options.output
        if target is None:
            if encoder.width not in SIZES:
                raise UserError(f"The encoder is {encoder.width} wide, no published size: name a place with --output.")
            target = cache_root() / "encoders" / f"avhubert-{SIZES[encoder.width]}"
            check_absent(target, "a conversion", "--output")
        source = {
            "file": options.checkpoint.name,
            "sha256": sha256_of(options.checkpoint),
            "model": "fine-tuned" if converted.fine_tuned else "pre-trained",
            "settings": {key: asdict(setting) for key, setting in converted.settings.items()},
        }
        with published_directory(target, replace=False) as directory:
            encoder.save_pretrained(directory, {"geometry": AVHUBERT, "source": source})
    for reason in dict.fromkeys(converted.dropped.values()):
        names = [name for name, why in converted.dropped.items() if why == reason]
        console.print(f"left out {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}")
    if file.ignored:
        console.print(f"not loaded, as no code of the file is: {', '.join(file.ignored)}")
    for key, setting in converted.settings.items():
        console.print(f"{key}={setting.value}: {setting.source}")
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    console.print(
        f"{target}: {source['model']} AV-HuBERT, {encoder.config.layers} layers, {encoder.width} wide, "
        f"{encoder.config.heads} heads, {parameters:,} parameters"
    )


if __name__ == "__main__":
    sys.exit(main())
