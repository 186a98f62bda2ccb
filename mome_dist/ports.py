"""Ports for the rendezvous of a world of processes."""

from __future__ import annotations

import random
import socket
from collections import deque
from contextlib import suppress

from mome_dist.errors import UserError

# Below those that a kernel gives to outgoing connections (from 32768 on): one of these could take a port between the
# moment when it is chosen and the one when a rank listens on it.
FIRST_PORT, PORTS = 20000, 12000
_CLAIMS = 64  # of this process that last; a world has opened its port long before as many others are started

_claims: deque[socket.socket] = deque(maxlen=_CLAIMS)


def free_port(start: int | None = None) -> int:
    """A TCP port that is free on this machine, and that no other process is given meanwhile.

    Args:
        start: number from which on ports are tried; by default a random one.

    Raises:
        UserError: there is none.
    """
    start = random.SystemRandom().randrange(PORTS) if start is None else start
    for offset in range(PORTS):
        port = FIRST_PORT + (start + offset) % PORTS
        claim = socket.socket(socket.AF_UNIX)
        with suppress(OSError), socket.socket() as probe:
            claim.bind(f"\0mome_dist-port-{port}")  # a name without a file, which goes with its process
            probe.bind(("", port))
            _claims.append(claim)
            return port
        claim.close()
    raise UserError(f"no free port from {FIRST_PORT} to {FIRST_PORT + PORTS} on {socket.gethostname()}.")
