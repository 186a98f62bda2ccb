"""What Submitit pickles and runs on every rank of a job: names and numbers only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import submitit


@dataclass(frozen=True)
class RankTask:
    """One training, or any other module, on all ranks of a job.

    Attributes:
        module, arguments: what each rank runs.
        max_tries: see `mome_dist.launchers.submitit.rank.run_rank`.
        variables: of the rank's environment, over those of the job.
    """

    module: str
    arguments: tuple[str, ...]
    max_tries: int
    variables: Mapping[str, str]

    def __call__(self) -> None:
        os.environ.update(self.variables)
        from mome_dist.launchers.submitit.rank import run_rank

        run_rank(self.module, self.arguments, self.max_tries)

    def checkpoint(self) -> Any:
        """Submitit's protocol: what to run after a requeue. The same; the run continues from its newest checkpoint."""
        return submitit.helpers.DelayedSubmission(self)
