"""Make an export of a checkpoint that the authors of Llama-AVSR, Llama-SMoP (JEJR) or Omni-AVSR published.

    mome-dist convert family model.pth exports/omni --audio-rates 4,16 --video-rates 2,5 \\
        llm=llama3_2_1b audio_encoder=whisper_medium_en video_encoder=avhubert_large

The file is the state of their model, or a Lightning checkpoint that holds it; no code in it runs. What it is follows
from its names and shapes; the frozen models are named as for a run, and further key=value arguments say what no tensor
tells: llm.lora.scale (0.125), projector.mixture.top_k (2). The export is loaded as any other: by mome-dist transcribe,
mome-dist evaluate and transformers' AutoModel.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.errors import UserError
from mome_dist.files import check_absent, check_downloaded
from mome_dist.quiet import quiet_libraries


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("convert family", __doc__)
    parser.add_argument("checkpoint", type=Path, help="the published file")
    parser.add_argument("target", type=Path, help="directory to make; it must not exist")
    for stream in ("audio", "video"):
        parser.add_argument(
            f"--{stream}-rates", metavar="N,N", help=f"{stream} frames a token, in the authors' order, if pooled"
        )
    parser.add_argument(
        "--own-video-encoder", type=Path, metavar="DIR", help="directory to make of the AV-HuBERT in the file"
    )
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Convert and say what was written."""
    parser = command_line()
    options, overrides = parser.parse_known_args(arguments)
    if unknown := [word for word in overrides if word.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    rates = {
        stream: _numbers(f"--{stream}-rates", getattr(options, f"{stream}_rates")) for stream in ("audio", "video")
    }
    check_downloaded(options.checkpoint)
    check_absent(options.target, "an export")

    quiet_libraries()
    from rich.console import Console

    from mome_dist.export.family import convert_family
    from mome_dist.progress import stages

    console = Console(highlight=False)
    with stages(console, f"converting {options.checkpoint}"):
        document = convert_family(options.checkpoint, options.target, overrides, rates, options.own_video_encoder)
    console.print(
        f"{options.target}: {document['name']}, {document['parameters']['trained']:,} trained parameters, "
        f"{', '.join(document['views'])}",
        soft_wrap=True,
    )


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text}: give whole numbers with commas between them.") from error


if __name__ == "__main__":
    sys.exit(main())
