"""DeepSpeed configurations of public projects (tests/data/deepspeed), and what they are without the keys to change."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from mome_dist.config import RunConfig
from mome_dist.config.deepspeed.file import DeepSpeedSettings, settled
from mome_dist.errors import UserError

FOLDER = Path(__file__).parent / "data" / "deepspeed"
PUBLIC = sorted(path.stem for path in FOLDER.glob("*.json"))


def public(name: str) -> dict[str, Any]:
    """The settings of a public configuration."""
    return json.loads((FOLDER / f"{name}.json").read_text())["settings"]


def named_keys(message: str) -> list[str]:
    """The keys that a refusal names, dotted."""
    return re.findall(r"(?:: |; )'([^']+)'", message)


def without(settings: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """The settings without these keys."""
    rest = copy.deepcopy(settings)
    for key in keys:
        *sections, last = key.split(".")
        section = rest
        for name in sections:
            section = section[name]
        del section[last]
    return rest


def stripped(settings: dict[str, Any], config: RunConfig, data_parallel: int) -> DeepSpeedSettings:
    """What acts of settings without the keys that the one refusal names, if there is one."""
    try:
        return settled(settings, config, data_parallel, "it")
    except UserError as error:
        keys = named_keys(str(error))
        assert keys and len(keys) == len(set(keys)), error
        return settled(without(settings, keys), config, data_parallel, "it")
