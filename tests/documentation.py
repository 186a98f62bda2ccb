"""The pages of the documentation, and the commands in them.

A block of commands is marked ``bash``. A comment before it, ``<!-- not run here: REASON -->``, says why no test does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from docs.hooks.notebook import read_notebook

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^(?:<!-- not run here: (?P<reason>[^>]*[^>\s]) -->\n)?^(?P<indent> *)```bash\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
CLUSTER = ("sbatch ", "mome-dist launch slurm ", "mome-dist launch submitit ")


@dataclass(frozen=True)
class Block:
    """Commands of a page.

    Attributes:
        page: its path from the root of the checkout.
        commands: one a line, without the comments behind them.
        reason: why no test runs them; None if one does.
    """

    page: str
    commands: tuple[str, ...]
    reason: str | None


def _pages_of(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from _pages_of(inner)


@cache
def pages() -> list[str]:
    """Paths of all pages, as the site's navigation has them."""
    elsewhere = {
        "index.md": "README.md",
        "contributing.md": "CONTRIBUTING.md",
        "changelog.md": "CHANGELOG.md",
        "benchmarks/index.md": "benchmarks/README.md",
        "tutorials/notebook.md": "docs/tutorials/notebook.ipynb",
    }
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    return [elsewhere.get(page) or f"docs/{page}" for page in _pages_of(navigation)]


def text_of(page: str) -> str:
    """A page in Markdown."""
    path = ROOT / page
    return read_notebook(path).markdown if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")


@cache
def blocks() -> list[Block]:
    """All blocks of commands, page after page."""
    found = []
    for page in pages():
        for match in BLOCK.finditer(text_of(page)):
            lines = (line.partition(" #")[0].strip() for line in match["text"].splitlines())
            found.append(Block(page, tuple(line for line in lines if line), match["reason"]))
    return found


def commands(cluster: bool) -> list[tuple[str, str]]:
    """Every command that a test has to run with its first page, each once: those for a cluster, or the others."""
    found: dict[str, str] = {}
    for block in blocks():
        if block.reason is None:
            for command in block.commands:
                if command.startswith(CLUSTER) == cluster:
                    found.setdefault(command, block.page)
    return list(found.items())


def words_of(command: str) -> list[str]:
    """A command's words, ``mome-dist`` being the checkout's own."""
    words = shlex.split(command)
    return ["python", "-m", "mome_dist", *words[1:]] if words[0] == "mome-dist" else words
