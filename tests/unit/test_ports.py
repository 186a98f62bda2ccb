"""A port is given to one world at a time, also before anything listens on it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from mome_dist.ports import FIRST_PORT, PORTS, free_port

ASK = "import sys; from mome_dist.ports import free_port; print(free_port(int(sys.argv[1])))"


def _of_another_process(start: int) -> int:
    told = subprocess.run([sys.executable, "-c", ASK, str(start)], capture_output=True, text=True, check=True)
    return int(told.stdout)


def test_a_port_is_given_once() -> None:
    mine = free_port()
    start = mine - FIRST_PORT
    assert free_port(start) != mine, "twice in this process"
    assert _of_another_process(start) != mine


def test_a_port_that_is_in_use_is_not_given() -> None:
    with socket.socket() as listening:
        start = free_port() - FIRST_PORT
        while True:  # the next one that nobody has claimed
            start = (start + 1) % PORTS
            try:
                listening.bind(("127.0.0.1", FIRST_PORT + start))
            except OSError:
                continue
            break
        listening.listen()
        assert _of_another_process(start) != FIRST_PORT + start


def test_no_port_is_one_of_outgoing_connections() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert all(not first <= free_port(start) <= last for start in (0, PORTS // 2, PORTS - 1))
