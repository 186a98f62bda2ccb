"""The format of an export: what trained, without the run that trained it.

    my-adapter/
      adapter.safetensors   trainable parameters and router biases, fp32, by the names of the one-process model
      config.json           all that is needed to rebuild the model, and the identity of the frozen models
      README.md             model card
      SHA256SUMS            hashes of the three, as `sha256sum --check` reads them

The same checkpoint always gives the same bytes. The frozen models are named by hash, never stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mome_dist.checkpoint.saved import Saved
from mome_dist.config.load import config_of
from mome_dist.errors import UserError
from mome_dist.files import save_tensors, sha256_of

FORMAT = "mome_dist.adapter/1"
WEIGHTS, CONFIG, CARD, SUMS = "adapter.safetensors", "config.json", "README.md", "SHA256SUMS"

_SUM = re.compile(r"([0-9a-f]{64})  (\S+)")
_AGAIN = "restore it from a copy, or export the run again"


def is_adapter(path: str | Path) -> bool:
    """Whether a directory is an export, whole or not, rather than a run or a checkpoint."""
    return any((Path(path) / name).is_file() for name in (WEIGHTS, CONFIG, SUMS))


def write_adapter(directory: Path, weights: Mapping[str, Tensor], document: Mapping[str, Any], card: str) -> None:
    """Fill an empty directory.

    Args:
        weights: by name; stored as fp32.
        document: the content of ``config.json`` but for the format and the facts about the weights, JSON values.
        card: the text of ``README.md``.
    """
    path = directory / WEIGHTS
    # One entry of metadata: the order of several is not fixed.
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    save_tensors(tensors, path, {"format": "pt"})
    facts = {"file": WEIGHTS, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    text = json.dumps({"format": FORMAT, **document, "weights": facts}, indent=2, ensure_ascii=False, allow_nan=False)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
    (directory / CARD).write_text(card, encoding="utf-8")
    sums = "".join(f"{sha256_of(directory / name)}  {name}\n" for name in (CARD, WEIGHTS, CONFIG))
    (directory / SUMS).write_text(sums, encoding="utf-8")


def read_adapter(directory: str | Path) -> Saved:
    """Read an export and check all of its files.

    Raises:
        UserError: naming the file that is missing, damaged or of another format.
    """
    directory = Path(directory)
    sums = _verify(directory)
    path = directory / CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document.get("format")
        if found != FORMAT:
            raise UserError(f"{path} has format {found!r}; this version reads {FORMAT!r}.")
        if document["weights"]["sha256"] != sums[WEIGHTS]:
            raise UserError(f"{path} belongs to another {WEIGHTS} than the one beside it; {_AGAIN}.")
        weights = load_file(directory / WEIGHTS)
        return Saved(
            directory=directory,
            config=config_of(document["config"], path),
            step=int(document["step"]),
            frozen={section: str(facts["fingerprint"]) for section, facts in document["frozen"].items()},
            tokens=dict(document["tokens"]),
            weights=weights,
            content=str(document["source"]["content"]),
        )
    except SafetensorError as error:
        raise UserError(f"{directory / WEIGHTS} cannot be read ({error}); {_AGAIN}.") from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no {CONFIG} of an export ({error!r}); {_AGAIN}.") from error


def _verify(directory: Path) -> dict[str, str]:
    """Hash every file and compare; returns the hashes by file name."""
    path = directory / SUMS
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): this is no whole export; {_AGAIN}.") from error
    matches = [_SUM.fullmatch(line) for line in lines]
    sums = {match[2]: match[1] for match in matches if match is not None}
    if rest or None in matches or not {WEIGHTS, CONFIG} <= sums.keys() <= {WEIGHTS, CONFIG, CARD}:
        raise UserError(f"{path} does not name {WEIGHTS}, {CONFIG} and {CARD} with their hashes; {_AGAIN}.")
    for name, expected in sums.items():
        file = directory / name
        if not file.is_file() or sha256_of(file) != expected:
            edited = f" (if you edited it, remove its line from {SUMS})" if name == CARD else ""
            raise UserError(f"{file} is missing, or is not what {SUMS} says; {_AGAIN}{edited}.")
    return sums
