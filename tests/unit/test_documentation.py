"""The documentation: the site is built, its links lead somewhere, and every command in it is run by a test."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import mome_dist
from docs.hooks import generated
from mome_dist import exit_codes
from mome_dist.commands.registry import COMMANDS
from mome_dist.config.described import of_dataclass, of_launcher, of_run, options
from mome_dist.config.load import _known_keys, options_of
from mome_dist.config.schema import RunConfig
from mome_dist.evaluation.request import EvaluationRequest
from tests import documentation
from tests.documentation import ROOT, blocks, pages, text_of
from tests.quickstart import test_commands
from tests.slurm import readme
from tests.unit import test_planning_docs

# Which test runs which commands.
RUN = {
    "tests/quickstart/test_commands.py": test_commands.documented_commands,
    "tests/slurm/test_train.py": readme.documented_commands,
    "tests/unit/test_planning_docs.py": test_planning_docs.documented_commands,
}


def test_every_command_is_run_by_a_test_or_says_why_not() -> None:
    run = {command for commands in RUN.values() for command in commands()}
    assert len(blocks()) > 40
    for block in blocks():
        left = set(block.commands) - run
        if block.reason is None:
            assert not left, f"{block.page}: no test runs {left}; add one, or <!-- not run here: REASON --> before them"
        else:
            assert left, f"{block.page}: {block.commands} are run; the reason why not, {block.reason!r}, can go"
    marks = sum(text_of(page).count("<!-- not run here") for page in pages())
    assert marks == sum(block.reason is not None for block in blocks()), "a reason stands right before its block"
    fences = [re.findall(r"^ *```bash$", text_of(page), re.M) for page in pages()]
    assert len(blocks()) == sum(map(len, fences))


def test_every_reason_names_tests_that_exist() -> None:
    named = [path for block in blocks() for path in re.findall(r"tests/[\w/]+\.py", block.reason or "")]
    assert len(named) > 5 and all((ROOT / path).is_file() for path in named)


def test_no_page_is_left_out_and_the_readme_is_short() -> None:
    written = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb")}
    assert written == {page for page in pages() if page.startswith("docs/")}
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


class Page(HTMLParser):
    """What a page of the site fetches, and what it shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.fetched += [named["src"] or ""] if "src" in named else []
        if tag == "link" and named.get("rel") in ("stylesheet", "preconnect", "icon", "preload"):
            self.fetched.append(named["href"] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does; a warning, such as of a link that leads nowhere, is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_has_every_page_and_asks_no_other_host(site: Path) -> None:
    built = list(site.rglob("*.html"))
    assert len(built) > len(pages())
    fetched = {address for path in built for address in Page(path).fetched}
    assert fetched and not [address for address in fetched if "//" in address]
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"url\(\s*['\"]?(?:https?:)?//", styles) and "@import" not in styles
    left = [path for path in built if "generated:" in path.read_text(encoding="utf-8")]
    assert not left, "a mark of what is generated was not filled in"


def test_the_search_knows_every_page(site: Path) -> None:
    found = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    places = {str(path.relative_to(site)) for path in site.rglob("*.html")} - {"404.html"}
    assert {entry["location"].partition("#")[0] or "index.html" for entry in found} == places


def test_files_of_the_repository_are_pages_of_the_site(site: Path) -> None:
    links = re.findall(r'href="([^"#]+)', (site / "index.html").read_text(encoding="utf-8"))
    assert {"benchmarks/results/learning.html", "contributing.html", "how-to/slurm.html"} <= set(links)
    assert (site / "benchmarks/results/learning.png").is_file()


def test_a_notebook_is_a_page_that_offers_its_file(site: Path) -> None:
    page = site / "tutorials/notebook.html"
    assert 'href="tutorials/notebook.html"' in (site / "index.html").read_text(encoding="utf-8")
    assert 'href="notebook.html"' in (site / "tutorials/small-models.html").read_text(encoding="utf-8")
    assert 'href="notebook.ipynb"' in page.read_text(encoding="utf-8")
    assert (site / "tutorials/notebook.ipynb").read_bytes() == (ROOT / "docs/tutorials/notebook.ipynb").read_bytes()
    pictures = [address for address in Page(page).fetched if re.fullmatch(r"notebook-\d\.png", address)]
    assert len(pictures) == 2 and all((page.parent / picture).is_file() for picture in pictures)


def test_a_link_that_leads_nowhere_stops_the_build(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# A\n\n[nowhere](#b)\n", encoding="utf-8")
    small = {"site_name": "x", "strict": True, "validation": settings["validation"], "nav": [{"A": "index.md"}]}
    (tmp_path / "mkdocs.yml").write_text(json.dumps(small), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "#b" in done.stdout + done.stderr


def _cells(page: str) -> Iterator[list[str]]:
    for line in page.splitlines():
        if line.startswith("| `"):
            yield [html.unescape(cell.strip()) for cell in line.strip("|").split(" | ")]


def test_every_key_has_a_row_with_its_meaning(site: Path) -> None:
    text = (site / "reference/configuration.html").read_text(encoding="utf-8")
    described = {key.name: key for key in of_run()}
    for key in _known_keys(RunConfig, ""):
        # What a section that is null by default may hold is told by the comment of the section.
        parent = key.rpartition(".")[0]
        known = key in described or any(name.startswith(f"{key}.") for name in described)
        assert known or re.search(rf"\b{key.rpartition('.')[2]}\b", described[parent].comment), key
    for each in described.values():
        assert each.comment or each.name.startswith("task.prompts."), f"{each.name} has no comment in its YAML file"
        assert f"<code>{each.name}</code>" in text, each.name
    assert described["training.steps"].default == "1000" and described["training.steps"].values == "whole number"
    assert described["data.batch_size"].default == "16" and described["mome.dispatch"].values.startswith("auto, ")
    rows = list(_cells(generated.configuration()))
    assert {len(row) for row in rows} == {2, 4}
    assert options("llm")["llama3_2_3b"] == "Llama 3.2 3B, whose licence asks you to fetch it yourself", "no command"
    for group in ("llm", "method", "experiment"):
        assert all(f"<code>{group}={option}</code>" in text for option in options_of(group))


def test_keys_of_launchers_and_of_an_evaluation_are_told() -> None:
    for name, schema in generated.LAUNCHERS.items():
        told = {key.name: key for key in of_launcher(name, schema)}
        assert {f"launcher.{key}" for key in _known_keys(schema, "")} == set(told)
        assert all(key.comment for key in told.values())
    asked = of_dataclass(EvaluationRequest)
    assert [key.name for key in asked] == [field.name for field in dataclasses.fields(EvaluationRequest)]
    assert all(key.comment for key in asked)
    assert next(key for key in asked if key.name == "snr").default == "[-5.0, 0.0, 5.0, 10.0]"


def test_commands_and_exit_codes_are_those_of_the_code() -> None:
    page = generated.commands()
    for command in COMMANDS:
        assert f"## mome-dist {command.name}\n" in page and command.what in page
    rows = {int(row[0]) for row in re.findall(r"^\| (\d+) \|", generated.exits(), re.M) for row in [[row]]}
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert rows == codes | {0}


def test_citation_and_templates_are_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mome_dist.__version__ and citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["url"].endswith("2510.04136") and len(paper["authors"]) == 7
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8"))
    labels = [field["attributes"]["label"] for field in form["body"]]
    assert "What `mome-dist doctor` prints" in labels
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "mypy"]


def test_pages_of_code_are_read_with_their_marks() -> None:
    text = "<!-- not run here: no net -->\n```bash\na  # b\n\nc\n```\n1. d\n\n    ```bash\n    e\n    ```\n"
    first, second = documentation.BLOCK.finditer(text)
    assert (first["reason"], second["reason"]) == ("no net", None) and second["text"].strip() == "e"
