"""What MkDocs does for this site besides rendering pages: see `hooks` in mkdocs.yml.

The site is a view of the repository. Pages of ``docs/`` and those that lie elsewhere (README, CONTRIBUTING, CHANGELOG,
benchmarks) link to each other as files do, so that links work in a checkout and on a forge; here they are turned into
links of the site. ``<!-- generated: NAME -->`` in a page is replaced by what the code says today. A notebook is a page,
and a file to download beside it.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the site tells of this checkout, whatever is installed

from docs.hooks import generated  # noqa: E402
from docs.hooks.notebook import read_notebook  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

# Files outside of docs/ that are part of the site, and where. Folders bring their Markdown and pictures.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks/index.md",
}
RESULTS = "benchmarks/results"
LINK = re.compile(r"(\]\()([^()\s]+)(\))")
MARK = re.compile(r"<!-- generated: ([\w-]+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of ``docs/``, and those of notebooks."""
    for source, place in ELSEWHERE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / RESULTS).glob("*")):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    for source in [file for file in files if file.src_uri.endswith(".ipynb")]:
        assert source.abs_src_path is not None, "a notebook is a file"
        notebook = read_notebook(Path(source.abs_src_path))
        files.append(File.generated(config, _page_of(source.src_uri), content=notebook.markdown))
        for name, picture in notebook.pictures.items():
            place = posixpath.join(posixpath.dirname(source.src_uri), name)
            files.append(File.generated(config, place, content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in what is generated, and turn links between files of the repository into links of the site."""
    markdown = MARK.sub(lambda found: generated.PAGES[found[1]](), markdown)
    here = source_of(page.file.src_uri)
    return LINK.sub(lambda found: found[1] + _site_link(here, page.file.src_uri, found[2]) + found[3], markdown)


def source_of(place: str) -> str:
    """The file of the repository that a page of the site is made of."""
    elsewhere = {page: source for source, page in ELSEWHERE.items()}
    return elsewhere.get(place) or (place if place.startswith(RESULTS) else f"docs/{place}")


def _page_of(notebook: str) -> str:
    """Where the page of a notebook is."""
    return notebook.removesuffix(".ipynb") + ".md"


def _site_link(source: str, place: str, target: str) -> str:
    """A link from a page as the site has it; what is no file of the site stays, for MkDocs to complain of."""
    path, hash_sign, anchor = target.partition("#")
    if not path or "://" in path or path.startswith(("mailto:", "/")):
        return target
    named = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    there = ELSEWHERE.get(named) or (named if named.startswith(RESULTS) else named.removeprefix("docs/"))
    if there == named and not named.startswith(RESULTS):
        return target
    if there.endswith(".ipynb") and _page_of(there) != place:  # only the page itself offers the file
        there = _page_of(there)
    return posixpath.relpath(there, posixpath.dirname(place) or ".") + hash_sign + anchor
