"""What collectives go over, and which device a rank has; no torch here, for launchers ask too.

NCCL where each rank of a node has a GPU of its own, gloo on CPUs. ``MOME_DIST_BACKEND=gloo`` lets ranks share GPUs, to
try a layout on fewer than it needs, or replaces NCCL where that does not work. It is a variable of the environment and
no key of a run because it says something about a machine: a run that is continued elsewhere must not carry it along,
and every command obeys it, those without a run's configuration too. ``CUDA_VISIBLE_DEVICES=`` hides all GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping

from mome_dist.errors import UserError

BACKEND = "MOME_DIST_BACKEND"
NCCL, GLOO = "nccl", "gloo"
SHARING_ADVICE = f"{BACKEND}={GLOO} lets ranks share a GPU, slowly"


def asked_backend(environment: Mapping[str, str]) -> str | None:
    """The backend that the environment asks for; None leaves it to the device.

    Raises:
        UserError: for any other value.
    """
    asked = environment.get(BACKEND) or None
    if asked not in (None, NCCL, GLOO):
        raise UserError(f"{BACKEND}={asked}: choose {NCCL} or {GLOO}, or unset it.")
    return asked


def place(local_rank: int, gpus: int, asked: str | None) -> tuple[str, str]:
    """The device of a rank ("cuda:1", "cpu"), and the backend of its world.

    Args:
        local_rank: among the ranks of its node.
        gpus: that it sees.
        asked: a backend, or None.

    Raises:
        UserError: if NCCL has no GPU for this rank.
    """
    backend = asked or (NCCL if gpus else GLOO)
    if backend == NCCL and local_rank >= gpus:
        raise UserError(
            f"rank {local_rank} of this node sees {gpus} GPUs and has none for itself, as NCCL wants it: start fewer "
            f"ranks, or give the node more GPUs; {SHARING_ADVICE}."
        )
    return f"cuda:{local_rank % gpus}" if gpus else "cpu", backend
