"""Pages: Markdown beside its figures, and the same as one HTML file that can be mailed.

The HTML file has its figures inside, asks no host for anything and runs no script: its own security policy forbids
both. Whatever HTML the Markdown has is shown, not used.
"""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from mome_dist.evaluation.style import save_figure
from mome_dist.files import write_text

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; font: 15px/1.5 system-ui, sans-serif; }
h1, h2 { line-height: 1.25; margin: 2rem 0 0.75rem; }
h2 { border-bottom: 1px solid #ddd; padding-bottom: 0.25rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0;
  font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #e6e6e6; padding: 0.25rem 0.75rem 0.25rem 0; text-align: left; vertical-align: top; }
th:empty { display: none; }
img { max-width: 100%; height: auto; }
code { font-size: 0.92em; overflow-wrap: anywhere; background: #f4f4f4; padding: 0.1em 0.3em; }
"""


def shown(folder: Path, name: str, figure: Any, title: str, reading: str) -> str:
    """Save a figure beside the page; Markdown that shows it and says how to read it."""
    save_figure(figure, folder / name)
    return f"![{title}]({name})\n\n{reading}\n"


def write_page(folder: Path, name: str, title: str, markdown: str) -> list[Path]:
    """Write ``NAME.md`` and ``NAME.html`` into a folder that has the figures.

    Args:
        title: of the HTML page's window.

    Returns:
        The two files.
    """
    pages = [folder / f"{name}.md", folder / f"{name}.html"]
    for path, text in zip(pages, (markdown, as_html(title, markdown, folder)), strict=True):
        write_text(path, text)
    return pages


def as_html(title: str, markdown: str, folder: Path) -> str:
    """A page of Markdown as HTML, with the PNG images of ``folder`` inside; of other images only the text is left."""
    reader = MarkdownIt("js-default")  # CommonMark and tables; HTML is text
    tokens = reader.parse(markdown)
    for token in tokens:
        for child in token.children or []:
            if child.type == "image":
                _embed(child, folder)
    body = reader.renderer.render(tokens, reader.options, {})
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _embed(image: Token, folder: Path) -> None:
    name = str(image.attrs["src"])
    if Path(name).name == name and name.endswith(".png") and (folder / name).is_file():
        data = base64.b64encode((folder / name).read_bytes()).decode("ascii")
        image.attrs["src"] = f"data:image/png;base64,{data}"
    else:
        image.type = "text"
