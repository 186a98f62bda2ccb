"""Train a run.

    mome-dist train experiment=quickstart
    mome-dist train experiment=tiny parallel=single training.steps=50 optimizer.learning_rate=1e-3
    mome-dist launch --nproc 2 train experiment=tiny

An experiment is a whole run, and key=value arguments change it: the keys and their groups are those of configs/, which
`mome-dist config show experiment=NAME` prints with what they mean. Alone it trains in one process; `mome-dist launch`
starts it on every rank of a layout, here or on Slurm. Started again, a run continues from its newest checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mome_dist.cli import main_guard
from mome_dist.config.load import load_training
from mome_dist.config.models import settle_models
from mome_dist.errors import PreemptedError
from mome_dist.exit_codes import PREEMPTED
from mome_dist.late_compilation import compile_when_called
from mome_dist.preflight import validate
from mome_dist.quiet import quiet_libraries


@main_guard
def main(overrides: Sequence[str] | None = None) -> int:
    """Check the configuration, then train; nothing heavy is imported before the check has passed.

    Returns:
        0, or 75 if a signal asked the run to stop and it should be started again.
    """
    arguments = list(sys.argv[1:] if overrides is None else overrides)
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    config = load_training(arguments)
    settle_models(config)
    layout = validate(config, int(os.environ.get("WORLD_SIZE", "1")))

    quiet_libraries()
    compile_when_called()
    from mome_dist.training.loop import train

    try:
        train(config, layout)
    except PreemptedError as stop:
        print(stop, file=sys.stderr, flush=True)
        return PREEMPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
