"""All gloo groups of a process share one thread that waits for messages.

torch gives every group a device of its own, whose thread wakes a hundred times a second whether or not anything has
come, and a layout has twenty groups. Where ranks share the cores of a machine, these threads take turns with training.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d, is_gloo_available

_INTERFACES = "GLOO_SOCKET_IFNAME"


def share_devices() -> None:
    """Have the gloo groups that are opened from now on share their devices; safe to call again."""
    group: Any = distributed_c10d.ProcessGroupGloo if is_gloo_available() else None
    if group is not None and not hasattr(group.__init__, "__wrapped__"):
        group.__init__ = _sharing(group, group.__init__)


def _sharing(group: Any, initialize: Callable[..., None]) -> Callable[..., None]:
    """Initialise a group as torch does without options, with the devices of the process."""

    @functools.wraps(initialize)
    def init(self: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = group._Options()
        options._timeout = timeout
        options._devices = _devices(os.getpid(), os.environ.get(_INTERFACES, ""))
        options._threads = 2 * len(options._devices)
        initialize(self, store, rank, size, options)

    return init


@functools.cache
def _devices(process: int, interfaces: str) -> list[Any]:
    """One for each network interface that is named, as torch has them; a fork of the process makes its own."""
    group: Any = distributed_c10d.ProcessGroupGloo
    named = [name for name in interfaces.split(",") if name]
    return [group.create_device(interface=name) for name in named] or [group.create_default_device()]
