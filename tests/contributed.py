"""The examples of CONTRIBUTING.md and of the page on routers, put where they say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from mome_dist.config import load
from mome_dist.moe import forms
from mome_dist.moe.forms.registry import FORMS, find_form
from mome_dist.paths import configs_dir

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
ROUTER = (ROOT / "docs/tutorials/own-router.md").read_text()


def section(title: str) -> str:
    """What the page has under a heading."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return text


def block(text: str, language: str) -> str:
    """The one block of a language in a section."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, re.S)
    return found


def write_config(text: str, group: str, folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Write a section's YAML file beside the others, in a copy; return the option's name."""
    (name,) = re.findall(rf"`configs/{group}/(\w+)\.yaml`", text)
    shutil.copytree(configs_dir(), folder / "configs")
    (folder / f"configs/{group}/{name}.yaml").write_text(block(text, "yaml"))
    patch.setattr(load, "configs_dir", lambda: folder / "configs")
    return name


def add_form(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Do what the page says for an expert form; return its name."""
    text = section("Add an expert form")
    name = write_config(text, "mome", folder, patch)
    (folder / "forms").mkdir()
    (folder / f"forms/{name}.py").write_text(block(text, "python"))
    patch.setattr(forms, "__path__", [*forms.__path__, str(folder / "forms")])
    ((registered, path),) = re.findall(r'`"(\w+)": "([\w.:]+)",`', text)
    assert registered == name
    patch.setitem(FORMS, registered, path)
    find_form.cache_clear()
    return name
