"""Compare this project's AV-HuBERT with the public classes on one checkpoint: docs/avhubert.md has the procedure.

    python tools/compare_avhubert.py CHECKPOINT.pt --public av_hubert --python PYTHON

--public is a checkout of facebookresearch/av_hubert with its fairseq, --python the interpreter of the environment in
which it runs. Both encode the same random clips. The largest difference of each length is printed, relative to the
largest feature; above the bound the exit code is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mome_dist.cli import Parser, main_guard
from mome_dist.errors import UserError
from mome_dist.quiet import quiet_libraries

if TYPE_CHECKING:
    import numpy as np

    from mome_dist.speech.avhubert import AVHubertEncoder

    Arrays = Mapping[str, np.ndarray]

LENGTHS = (1, 2, 25, 76, 200)  # frames
BOUND = 2e-5


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, encode on both sides, print a table; 1 if a difference is above the bound."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the published file; the public code unpickles it")
    parser.add_argument("--public", type=Path, required=True, metavar="DIR", help="checkout of av_hubert")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs it (default: this one)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T", help="frames of the clips")
    parser.add_argument("--bound", type=float, default=BOUND, help="largest relative difference (%(default)s)")
    options = parser.parse_args(arguments)
    if not (options.public / "avhubert" / "hubert.py").is_file():
        raise UserError(
            f"--public {options.public} has no avhubert/hubert.py: clone https://github.com/facebookresearch/av_hubert "
            "there, with its submodule fairseq."
        )

    quiet_libraries()
    from mome_dist.speech.avhubert.conversion import convert
    from mome_dist.speech.avhubert.fairseq_file import read_fairseq

    file = read_fairseq(options.checkpoint)
    encoder = convert(file.tensors, file.settings).encoder
    clips = random_clips(options.lengths)
    theirs = public_features(options.public, options.python, options.checkpoint, clips)
    differences = relative_differences(our_features(encoder, clips), theirs)
    print("frames  largest relative difference")
    for name, difference in differences.items():
        print(f"{name:>6}  {difference:.1e}{'' if difference <= options.bound else '  above the bound'}")
    return int(max(differences.values()) > options.bound)


def random_clips(lengths: Sequence[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Clips uint8 [T, 96, 96] by their length.

    Patches of 16 x 16 that change with every frame: noise in single pixels averages out, and all frames look alike.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    patches = {str(length): random.integers(0, 256, (length, 6, 6), dtype=np.uint8) for length in lengths}
    return {name: each.repeat(16, axis=1).repeat(16, axis=2) for name, each in patches.items()}


def our_features(encoder: AVHubertEncoder, clips: Arrays) -> dict[str, np.ndarray]:
    """Features [T, width] of each clip alone."""
    import torch

    with torch.no_grad():
        return {name: encoder([torch.from_numpy(clip)])[0].numpy() for name, clip in clips.items()}


def public_features(public: Path, python: str, checkpoint: Path, clips: Arrays) -> dict[str, np.ndarray]:
    """The same of the public classes, in a process and environment of their own.

    Raises:
        UserError: if that process fails; the message is its last line.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch, "clips.npz"), Path(scratch, "features.npz")
        np.savez(given, allow_pickle=False, **clips)
        worker = Path(__file__).with_name("public_avhubert.py")
        try:
            done = subprocess.run(
                [python, str(worker), str(public.resolve()), str(checkpoint.resolve()), str(given), str(found)],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise UserError(f"--python {python} cannot be started ({error.strerror}).") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(
                f"the public code in {public} does not run with {python} ({last}): name the interpreter of its "
                "environment with --python (docs/avhubert.md)."
            )
        with np.load(found) as features:
            return dict(features)


def relative_differences(ours: Arrays, theirs: Arrays) -> dict[str, float]:
    """The largest difference of each clip's features over the largest feature of the public ones; NaN is infinite.

    Raises:
        UserError: if the two have other clips or shapes.
    """
    import numpy as np

    shapes = [{name: value.shape for name, value in side.items()} for side in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise UserError(f"The features have shapes {shapes[0]}, those of the public code {shapes[1]}.")
    differences = {name: float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in ours}
    return {name: value if np.isfinite(value) else float("inf") for name, value in differences.items()}


if __name__ == "__main__":
    sys.exit(main())
