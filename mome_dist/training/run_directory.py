"""The directory of a run: one world of ranks owns it while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from mome_dist.config import RunConfig
from mome_dist.errors import UserError
from mome_dist.ownership import Ownership, owned
from mome_dist.system_errors import explain


@contextmanager
def owned_run(config: RunConfig) -> Iterator[Ownership | None]:
    """Own ``output_dir`` for all ranks; every rank of the world enters this before anything is written.

    Yields:
        On rank 0 the ownership, None on the others.

    Raises:
        UserError: on all ranks, if somebody else owns the directory, or it cannot be written to.
    """
    with ExitStack() as stack:
        ownership, problem = None, None
        if dist.get_rank() == 0:
            try:
                ownership = stack.enter_context(owned(Path(config.output_dir), "training", "choose another output_dir"))
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = explain(error)
                if problem is None:
                    raise
        told = [problem]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise UserError(told[0])
        yield ownership
