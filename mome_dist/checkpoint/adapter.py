"""The format of an export: what trained, without the run that trained it, as a model of transformers is saved.

    my-adapter/
      model.safetensors   trainable parameters and router biases, fp32, by the names of the one-process model; above a
                          limit, model-00001-of-0000N.safetensors and model.safetensors.index.json
      config.json         all that is needed to rebuild the model, and the identity of the frozen models
      README.md           model card
      SHA256SUMS          hashes of them, as `sha256sum --check` reads them
      peft/TERMS/         the LLM's low-rank terms as PEFT reads them, of a model without experts

The same checkpoint always gives the same bytes. The frozen models are named by hash, never stored. Exports of before
transformers knew them (their weights are in adapter.safetensors) are read as well.
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
from mome_dist.hub import INDEX, model_at
from mome_dist.hub import SINGLE as WEIGHTS

FORMAT, FIRST = "mome_dist.adapter/2", "mome_dist.adapter/1"
FIRST_WEIGHTS = "adapter.safetensors"
CONFIG, CARD, SUMS = "config.json", "README.md", "SHA256SUMS"
PEFT = "peft"
LARGEST_SHARD = "5GB"

_SUM = re.compile(r"([0-9a-f]{64})  ([\w.-]+)")
_AGAIN = "restore it from a copy, or export the run again"


def is_adapter(path: str | Path) -> bool:
    """Whether a directory is an export, whole or not, rather than a run or a checkpoint."""
    return any((Path(path) / name).is_file() for name in (WEIGHTS, INDEX, FIRST_WEIGHTS, CONFIG, SUMS))


def write_adapter(
    directory: Path,
    weights: Mapping[str, Tensor],
    document: Mapping[str, Any],
    card: str,
    max_shard_size: int | str = LARGEST_SHARD,
) -> None:
    """Fill an empty directory.

    Args:
        weights: by name; stored as fp32.
        document: the content of ``config.json`` but for the format and the facts about the weights, JSON values.
        card: the text of ``README.md``.
        max_shard_size: bytes, or as "200MB", above which weights are cut into several files; a tensor never is.
    """
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    names = _save(directory, tensors, max_shard_size)
    facts = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_of(directory / name)} for name in names
    }
    text = json.dumps({"format": FORMAT, **document, "weights": facts}, indent=2, ensure_ascii=False, allow_nan=False)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
    (directory / CARD).write_text(card, encoding="utf-8")
    sums = "".join(f"{sha256_of(directory / name)}  {name}\n" for name in (CARD, *names, CONFIG))
    (directory / SUMS).write_text(sums, encoding="utf-8")


def _save(directory: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str) -> list[str]:
    """Write the weights; returns the names of all files that say something of them."""
    shards: list[dict[str, Tensor]] = [{}]
    limit, filled = _bytes_of(max_shard_size), 0
    for name, tensor in sorted(tensors.items()):
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [WEIGHTS]
    for file, held in zip(names, shards, strict=True):
        # One entry of metadata: the order of several is not fixed.
        save_tensors(held, directory / file, {"format": "pt"})
    if len(shards) == 1:
        return names
    total = sum(tensor.nbytes for tensor in tensors.values())
    places = {name: file for file, held in zip(names, shards, strict=True) for name in held}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
    (directory / INDEX).write_text(index + "\n", encoding="utf-8")
    return [*names, INDEX]


def _bytes_of(size: int | str) -> int:
    """As transformers reads it: a number, or a text such as "5GB" or "200MiB"."""
    match = re.fullmatch(r"(\d+) ?([KMGT]?)(i?)B?", str(size), re.IGNORECASE)
    if match is None or not int(match[1]):
        raise UserError(f"max_shard_size={size!r} is no size: give bytes, or a text such as '5GB'.")
    return int(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")


def read_adapter(directory: str | Path) -> Saved:
    """Read an export and check all of its files.

    Raises:
        UserError: naming the file that is missing, damaged or of another format.
    """
    directory = Path(directory)
    document = read_document(directory)
    return saved_of(directory, document, read_weights(directory, document))


def read_document(directory: Path) -> dict[str, Any]:
    """Check all files of an export and return the content of its ``config.json``; errors as `read_adapter`."""
    sums = _verify(directory)
    path = directory / CONFIG
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = document.get("format")
        if found not in (FORMAT, FIRST):
            raise UserError(f"{path} has format {found!r}; this version reads {FORMAT!r} and {FIRST!r}.")
        hashes = {name: str(facts["sha256"]) for name, facts in _facts(document).items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise _no_config(path, error) from error
    for name, expected in hashes.items():
        if sums.get(name) != expected:
            raise UserError(f"{path} belongs to another {name} than the one beside it; {_AGAIN}.")
    if surplus := sums.keys() - hashes.keys() - {CARD, CONFIG}:
        raise UserError(f"{directory / SUMS} names {min(surplus)}, which is no file of this export; {_AGAIN}.")
    return document


def read_weights(directory: Path, document: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an export whose files have been checked (`read_document`)."""
    weights: dict[str, Tensor] = {}
    for name in _facts(document):
        if name == INDEX:
            continue
        try:
            weights.update(load_file(directory / name))
        except SafetensorError as error:
            raise UserError(f"{directory / name} cannot be read ({error}); {_AGAIN}.") from error
    return weights


def saved_of(directory: Path, document: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Saved:
    """What an export says of itself, with its weights, or none for an untrained model.

    Args:
        directory: that it was read from, for messages.
        document: the content of its ``config.json``.

    Raises:
        UserError: the document is none.
    """
    path = directory / CONFIG
    try:
        return Saved(
            directory=directory,
            config=config_of(document["config"], path),
            step=int(document["step"]),
            frozen={section: str(facts["fingerprint"]) for section, facts in document["frozen"].items()},
            tokens=dict(document["tokens"]),
            weights=weights,
            content=str(document["source"]["content"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _no_config(path, error) from error


def is_current(document: Mapping[str, Any]) -> bool:
    """Whether an export is one that transformers knows."""
    return document.get("format") == FORMAT


def _facts(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Bytes and hash of each file of the weights."""
    weights = document["weights"]
    return dict(weights) if is_current(document) else {FIRST_WEIGHTS: weights}


def _no_config(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is no {CONFIG} of an export ({error!r}); {_AGAIN}.")


def _verify(directory: Path) -> dict[str, str]:
    """Hash every file and compare; returns the hashes by file name."""
    path = directory / SUMS
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): this is no whole export; {_AGAIN}.") from error
    matches = [_SUM.fullmatch(line) for line in lines]
    sums = {match[2]: match[1] for match in matches if match is not None}
    if rest or None in matches or CONFIG not in sums:
        raise UserError(f"{path} does not name {CONFIG} and the files beside it with their hashes; {_AGAIN}.")
    if model_at(directory) is not None:
        sums.pop(CARD, None)  # of a model of the hub the card is its page there, which its publisher edits
    for name, expected in sums.items():
        file = directory / name
        if not file.is_file() or sha256_of(file) != expected:
            edited = f" (if you edited it, remove its line from {SUMS})" if name == CARD else ""
            raise UserError(f"{file} is missing, or is not what {SUMS} says; {_AGAIN}{edited}.")
    return sums
