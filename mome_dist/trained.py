"""What was trained, however a command line names it: a run, one of its checkpoints, or an export. No torch here.

Every command that takes one takes it as its first argument, and as ``run=DIR`` or ``checkpoint=DIR``. What is missing
is told in one place, in a second, with what is there instead.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mome_dist.errors import UserError
from mome_dist.hints import did_you_mean, near

RUN, CHECKPOINT, EXPORT = "run", "checkpoint", "export"
KEYS = ("checkpoint", "run")  # by which a place may be named
WANTED = "name a run, a checkpoint of one, or an export"
_AVERAGE = re.compile(r"average:(\d+)")
_SHOWN = 6  # runs that a message lists


@dataclass(frozen=True)
class Trained:
    """Something trained.

    Attributes:
        kind: `RUN`, `CHECKPOINT` or `EXPORT`.
        directory: as it was named.
        config: the file with its configuration: YAML of a checkpoint (a run's newest), JSON of an export.
    """

    kind: str
    directory: Path
    config: Path


def place_of(word: str) -> str | None:
    """The place that an argument names, alone or by one of `KEYS`; None if it sets another key."""
    key, equals, value = word.partition("=")
    if not equals or "/" in key:  # a folder may have = in its name
        return word
    return value if key in KEYS else None


def with_key(arguments: Sequence[str], key: str) -> list[str]:
    """Arguments of a command that takes ``key=value``, where the first may be a place alone, or named by any of `KEYS`.

    What looks like an option is left to the command.
    """
    if not arguments or arguments[0].startswith("-") or place_of(arguments[0]) is None:
        return list(arguments)
    return [f"{key}={place_of(arguments[0])}", *arguments[1:]]


def place_argument(word: str) -> Path:
    """The type of a positional argument that names something trained."""
    place = place_of(word)
    if not place:
        raise argparse.ArgumentTypeError(f"{word!r} is no place: {WANTED}")
    return Path(place)


def find_trained(place: str | Path) -> Trained:
    """What is at a place.

    Raises:
        UserError: nothing trained is there; the message says what is.
    """
    path = Path(place)
    if (path / "index.json").is_file():
        return Trained(CHECKPOINT, path, path / "config.yaml")
    latest = path / "checkpoints" / "latest"
    if latest.is_file():
        newest = latest.parent / latest.read_text(encoding="utf-8").strip()
        if not (newest / "index.json").is_file():
            raise UserError(
                f"{latest} names {newest.name}, which is not a complete checkpoint; name another or remove it."
            )
        return Trained(RUN, path, newest / "config.yaml")
    if is_export(path):
        return Trained(EXPORT, path, path / "config.json")
    raise nothing_at(path)


def is_export(path: Path) -> bool:
    """Whether a directory is an export, whole or not, and not a model of somebody else's."""
    if any((path / name).is_file() for name in ("SHA256SUMS", "adapter.safetensors")):
        return True
    return str(_json(path / "config.json").get("format", "")).startswith("mome_dist.adapter/")


def nothing_at(place: str | Path) -> UserError:
    """What to tell about a place where a run, a checkpoint or an export should be and is not."""
    path = Path(place)
    if str(place).startswith("hf:/"):
        return UserError(f"{place}: what was trained is read from a folder: `hf download OWNER/NAME --local-dir DIR`.")
    if not path.exists():
        shown = _trained_in(path.parent) if path.parent.is_dir() else []
        alike = near(path.name, [found.name for found in shown])
        meant = did_you_mean([str(path.parent / name) for name in alike])
        if meant:
            return UserError(f"{path}: there is no such folder{meant}")
        listed = f" ({', '.join(map(str, shown[:_SHOWN]))})" if shown else ""
        return UserError(f"{path}: there is no such folder; {WANTED}{listed}.")
    if path.is_file():
        return UserError(f"{path} is a file; {WANTED}: each is a folder.")
    if is_export(path):
        return UserError(f"{path} is an export, which has no checkpoints; name its run, or a checkpoint.")
    if inside := _trained_in(path):
        return UserError(f"{path} holds {', '.join(map(str, inside[:_SHOWN]))}: name one of them.")
    if any(path.glob("mp_rank_*")) or any(path.glob("*/mp_rank_*")):
        return UserError(
            f"{path} is a checkpoint of DeepSpeed: make one of this project's of it with `mome-dist reshard`."
        )
    if (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file():
        return UserError(f"{path} is a run without a checkpoint yet: training.save_every says when it saves one.")
    if (found := _json(path / "config.json")).get("architectures") or found.get("model_type"):
        return UserError(f"{path} is a model of transformers, not something trained here; {WANTED}.")
    if not any(path.iterdir()):
        return UserError(f"{path} is an empty folder; {WANTED}.")
    return UserError(f"{path} has no index.json, no checkpoints/latest and no config.json of an export; {WANTED}.")


def run_of(place: str | Path) -> Path:
    """The directory of the run that a place names: itself, or that of its checkpoint. It may not have saved yet.

    Raises:
        UserError: it is neither.
    """
    path = Path(place)
    if (path / "index.json").is_file() and path.resolve().parent.name == "checkpoints":
        return path.resolve().parent.parent
    if (path / "config.yaml").is_file() and not (path / "index.json").is_file():
        return path
    found = find_trained(path)
    if found.kind == EXPORT:
        raise UserError(f"{path} is an export, which knows nothing of its training: name the run.")
    if found.kind == CHECKPOINT:
        raise UserError(f"{path} is a checkpoint outside of its run (RUN/checkpoints/): name the run.")
    return path


def count_of_average(select: str) -> int | None:
    """How many checkpoints ``average:N`` means; None for "latest" and "best".

    Raises:
        UserError: for anything else.
    """
    counted = _AVERAGE.fullmatch(select)
    if select not in ("latest", "best") and counted is None:
        raise UserError(f"select={select!r}: choose latest, best or average:N.")
    return None if counted is None else int(counted[1])


def _trained_in(folder: Path) -> list[Path]:
    """Runs, checkpoints and exports in a folder, by name."""
    found = [
        path
        for path in folder.iterdir()
        if path.is_dir()
        and ((path / "index.json").is_file() or (path / "checkpoints/latest").is_file() or is_export(path))
    ]
    return sorted(found)


def _json(path: Path) -> dict[str, object]:
    """A JSON object; empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
