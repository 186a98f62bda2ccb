"""One timed piece of work of `benchmarks.reshard` in a process of its own, so that its peak memory is its own.

Prints one line of JSON: seconds, bytes written, peak resident memory in bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from benchmarks.resident import peak_resident
from mome_dist.files import fsync
from mome_dist.quiet import quiet_libraries

CHUNK = 4 << 20


def copy(source: Path, target: Path) -> None:
    """Read and write every file in large pieces, one after the other, and flush it to disk."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as read, (target / path.name).open("wb", buffering=0) as write:
            while piece := read.read(CHUNK):
                write.write(piece)
        fsync(target / path.name)
    fsync(target)


def main() -> None:
    """Do the work and print its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", choices=("copy", "canonical", "deepspeed"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    quiet_libraries()
    if options.work == "copy":
        began = time.perf_counter()
        copy(options.source, options.target)
    else:
        from mome_dist.checkpoint.reshard import reshard
        from mome_dist.parallel.layout import Layout

        began = time.perf_counter()
        reshard(options.source, options.target, options.work, Layout(tp=1, pp=2, ep=2, dp=4), zero=1)
    seconds = time.perf_counter() - began
    written = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    shutil.rmtree(options.target)
    print(json.dumps({"seconds": seconds, "bytes": written, "peak": peak_resident()}))


if __name__ == "__main__":
    main()
