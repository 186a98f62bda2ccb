"""Notebooks as pages: their text, their code, and below each cell what it wrote and drew when it was last run."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Notebook:
    """A notebook as a page of the site.

    Attributes:
        markdown: the page.
        pictures: PNG files that it shows, by their names beside it.
    """

    markdown: str
    pictures: dict[str, bytes]


def read_notebook(path: Path) -> Notebook:
    """The page of a ``.ipynb`` file (nbformat 4), with a link to the file itself below its title."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(_block("python", source) if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", ()):
            if (drawn := output.get("data", {}).get("image/png")) is not None:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(drawn))
                parts.append(f"![what the cell draws]({name})")
            elif written := text_of(output):
                parts.append(_block("text", written))
    title, _, rest = parts[0].partition("\n")
    parts[0] = f"{title}\n\nThis page is a notebook as it was last run: [{path.name}]({path.name}).\n{rest}"
    return Notebook("\n\n".join(parts) + "\n", pictures)


def text_of(output: dict[str, Any]) -> str:
    """What an output of a cell says in words."""
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", ()))


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
