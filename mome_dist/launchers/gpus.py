"""Which GPUs a process would see, without importing torch in it, and the cores beside each of them.

The answer is the driver's own, to a process that only asks: it alone knows what CUDA_VISIBLE_DEVICES, MIG slices, the
devices of a container and the cgroup of a Slurm job leave. Files under /dev or ``nvidia-smi -L`` know a part of that.
"""

from __future__ import annotations

import ctypes
import functools
import json
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError

# Of each kind of torch build: the driver's library, and its calls to begin, to count, and to name a device on the bus.
DRIVERS = {
    "cuda": ("libcuda.so.1", "cuInit", "cuDeviceGetCount", "cuDeviceGetPCIBusId"),
    "hip": ("libamdhip64.so", "hipInit", "hipGetDeviceCount", "hipDeviceGetPCIBusId"),
}
_TIMEOUT_SECONDS = 120  # a driver without persistence takes seconds for each GPU of a node
_ADDRESS_BYTES = 32


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """PCI addresses (``0000:17:00.0``) of the GPUs that torch would use in a process with this environment.

    They are in the order of their numbers there; slices of one GPU have the same address. Empty where torch is built
    for CPUs or there is no driver.

    Raises:
        UserError: the driver does not answer.
    """
    kind = _torch_build()
    if kind is None:
        return []
    command = [sys.executable, "-m", "mome_dist.launchers.gpus", kind]
    try:
        done = subprocess.run(
            command,
            env=dict(environment),
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"the GPU driver did not answer within {_TIMEOUT_SECONDS} s: look at this node with nvidia-smi or rocm-smi."
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"asking the GPU driver failed with code {error.returncode}: {error.stderr.strip()}") from error
    return [str(address) for address in json.loads(done.stdout)]


def ask_driver(library: Any, names: Sequence[str]) -> list[str]:
    """What `visible_gpus` returns, from the driver's library; empty where it has no device for this process."""
    begin, count_devices, name_device = (getattr(library, name) for name in names)
    count = ctypes.c_int(0)
    if begin(0) or count_devices(ctypes.byref(count)):
        return []
    addresses = []
    for device in range(count.value):
        address = ctypes.create_string_buffer(_ADDRESS_BYTES)
        known = name_device(address, _ADDRESS_BYTES, device) == 0
        addresses.append(address.value.decode("ascii").lower() if known else "")
    return addresses


@functools.cache
def _torch_build() -> str | None:
    """What the installed torch is built for: "cuda", "hip" or None. Its version file says so, and imports nothing."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    facts = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    return next((kind for kind in DRIVERS if facts.get(kind)), None)


def near_cores(address: str, root: Path = Path("/sys")) -> frozenset[int] | None:
    """Cores of the NUMA node that a GPU is attached to; None where the machine has one, or does not say.

    Args:
        address: on the PCI bus.
        root: of the kernel's file system of devices.
    """
    device = root / "bus" / "pci" / "devices" / address
    try:
        if int((device / "numa_node").read_text(encoding="ascii")) < 0:
            return None
        return parse_cores((device / "local_cpulist").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def parse_cores(text: str) -> frozenset[int]:
    """``0-3,8`` -> 0, 1, 2, 3, 8."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def _main(kind: str) -> None:
    library, *names = DRIVERS[kind]
    try:
        found = ask_driver(ctypes.CDLL(library), names)
    except (OSError, AttributeError):  # no driver here
        found = []
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1])
