"""Ready-made slices of the frozen LLM, kept between runs.

A rank under tensor parallelism reads rows and columns from all over the source files, at every start. This cache keeps
what it got, in the model's own layout and type, as one file that is read from front to back:

    <root>/<hash of source and slicing>/slices.safetensors   the rank's parameters
                                        slices.json          what they are, and the SHA-256 of the file
                                        lock

Ranks that hold the same slices (data parallelism) share one entry. Whichever of them takes the lock first writes it,
the others go on without waiting. The JSON file is written last and names the hash of the other, and every read checks
it: an entry that is unfinished, cut off or altered is rebuilt from the source, with a message.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mome_dist.files import fsync, save_tensors, sha256_of, write_json, written_aside

FORMAT = "mome_dist.slices/1"
SLICES, DESCRIPTION, LOCK = "slices.safetensors", "slices.json", "lock"


class SliceCache:
    """Slices by source and slicing.

    Args:
        root: directory of the cache; made when something is written.
        source: identity of the source files' content, such as a hash over them.
        report: told in one line about an entry that is damaged or cannot be written. Neither stops a run.
    """

    def __init__(self, root: str | Path, source: str, report: Callable[[str], None]) -> None:
        self.root, self.source, self.report = Path(root), source, report

    def entry(self, slicing: Mapping[str, Any]) -> Path:
        """Directory of one set of slices; ``slicing`` is what JSON can hold."""
        key = json.dumps({"format": FORMAT, "source": self.source, **slicing}, sort_keys=True)
        return self.root / hashlib.sha256(key.encode()).hexdigest()[:32]

    def read(self, slicing: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> bool:
        """Copy cached slices into ``parameters``; False if there is no good entry, and the caller must fill them."""
        entry = self.entry(slicing)
        if not (entry / DESCRIPTION).is_file():
            return False
        problem = _problem(entry)
        if problem is None:
            try:
                with safe_open(entry / SLICES, framework="pt") as file:
                    if _shapes(file) == {name: list(tensor.shape) for name, tensor in parameters.items()}:
                        for name, parameter in parameters.items():
                            parameter.copy_(file.get_tensor(name))
                        return True
                problem = "holds other tensors than the model"
            except (OSError, SafetensorError) as error:
                problem = f"cannot be read ({error})"
        self.report(f"llm.cache_slices: {entry / SLICES} {problem}; reading the LLM's own files and writing it again.")
        (entry / DESCRIPTION).unlink(missing_ok=True)
        return False

    def write(self, slicing: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Keep ``parameters``, unless another process is at it or has done it."""
        entry = self.entry(slicing)
        try:
            entry.mkdir(parents=True, exist_ok=True)
            with _try_lock(entry / LOCK) as locked:
                if not locked or (entry / DESCRIPTION).is_file():
                    return
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
                with written_aside(entry / SLICES) as path:
                    save_tensors(tensors, path)
                    description = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                fsync(entry)
                whole = {"format": FORMAT, "source": self.source, "slicing": dict(slicing), **description}
                write_json(entry / DESCRIPTION, whole)
        except OSError as error:
            self.report(f"llm.cache_slices: {entry} cannot be written ({error}); going on without.")


def _problem(entry: Path) -> str | None:
    """What is wrong with the file of an entry that has a description; None if it is as it was written."""
    try:
        description = json.loads((entry / DESCRIPTION).read_text(encoding="utf-8"))
        size = (entry / SLICES).stat().st_size
        if size != description["bytes"]:
            return f"has {size} bytes instead of {description['bytes']}"
        if sha256_of(entry / SLICES) != description["sha256"]:
            return "is damaged (its SHA-256 differs)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError):
        return f"has an unreadable {DESCRIPTION}"
    return None


def _shapes(file: Any) -> dict[str, list[int]]:
    return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Yield whether this process got the lock; it ends with the block, or with the process."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks: two writers put the same bytes in place, each in one step
        yield True
