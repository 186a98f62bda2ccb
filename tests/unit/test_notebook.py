"""The notebook of the documentation: its cells run on a small run, and what it shows is what its code says."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from docs.hooks.notebook import read_notebook, text_of
from mome_dist import evaluate
from mome_dist.config import RunConfig
from mome_dist.config.schema import TaskConfig
from tests.evaluation_run import make_run

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs/tutorials/notebook.ipynb"
AUDIO, VIDEO = (4, 16), (2, 5)  # the rates of experiment=tiny


@dataclass
class Shown:
    """What a cell wrote, and how many pictures it drew."""

    text: str = ""
    pictures: int = 0


def _cells() -> list[dict[str, Any]]:
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in document["cells"] if cell["cell_type"] == "code"]


def _shown(cell: dict[str, Any]) -> Shown:
    """What the file has of a cell."""
    pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
    return Shown("".join(text_of(output) for output in cell["outputs"] if output not in pictures), len(pictures))


@dataclass
class Session:
    """Runs cells one after the other, as a kernel does: a figure that ends a cell, or is open then, is a picture."""

    names: dict[str, Any] = field(default_factory=dict)

    def run(self, source: str) -> Shown:
        """Run a cell."""
        *body, last = ast.parse(source).body
        written, value = io.StringIO(), None
        with contextlib.redirect_stdout(written):
            if isinstance(last, ast.Expr):
                exec(compile(ast.Module(body, []), "<cell>", "exec"), self.names)
                value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), self.names)
            else:
                exec(compile(ast.Module([*body, last], []), "<cell>", "exec"), self.names)
        pictures = len(plt.get_fignums()) + isinstance(value, Figure)
        plt.close("all")
        return Shown(written.getvalue(), pictures)


def _all_rates(config: RunConfig) -> None:
    rates: dict[str, Any] = {f"{name}_audio_rates": list(AUDIO) for name in ("asr", "avsr")}
    rates |= {f"{name}_video_rates": list(VIDEO) for name in ("vsr", "avsr")}
    config.task = TaskConfig(tasks=["asr", "vsr", "avsr"], **rates)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, tiny_corpus_dir: Path) -> list[Shown]:
    """What the cells show of a small run that was never trained, in the folders that the notebook expects."""
    root = tmp_path_factory.mktemp("checkout")
    made = make_run(root / "made", tiny_corpus_dir, change=_all_rates)
    assert evaluate.main([str(made)]) == 0
    (root / "runs").mkdir()
    (root / "runs/tiny").symlink_to(made)
    (root / "docs/tutorials").mkdir(parents=True)
    session, here = Session(), Path.cwd()
    plt.switch_backend("agg")
    os.chdir(root / "docs/tutorials")
    try:
        shown = [session.run("".join(cell["source"])) for cell in _cells()]
    finally:
        os.chdir(here)
    return shown


def _masked(text: str) -> list[str]:
    """The lines of an output, without what depends on the model: numbers, and the words that it wrote."""
    lines = [re.sub(r"\d+\.\d+.*", "#", line) for line in text.splitlines()]
    return [line if "frames of audio" not in line else re.sub(r"\d+", "#", line) for line in lines]


def test_every_cell_ran_in_order_and_without_an_error() -> None:
    assert [cell["execution_count"] for cell in _cells()] == list(range(1, len(_cells()) + 1))
    assert all(output["output_type"] != "error" for cell in _cells() for output in cell["outputs"])
    assert NOTEBOOK.stat().st_size < 2**20


def test_the_cells_run_and_show_what_the_file_has(fresh: list[Shown]) -> None:
    kept = [_shown(cell) for cell in _cells()]
    pictures = [shown.pictures for shown in kept]
    assert [shown.pictures for shown in fresh] == pictures and sum(pictures) == 2
    clip, table, agreement = 1, 2, -1
    assert kept[0].text.partition("trained at")[2] == fresh[0].text.partition("trained at")[2] != ""
    assert _masked(kept[clip].text)[1:] == _masked(fresh[clip].text)[1:]
    views = [[line.split()[0] for line in shown[table].text.splitlines()] for shown in (kept, fresh)]
    assert views[0] == views[1] and len(views[0]) == 1 + 8
    assert _masked(kept[agreement].text) == _masked(fresh[agreement].text)


def test_tokens_in_the_file_are_those_of_its_clip() -> None:
    """What the LLM reads is known without a model: frames over the rate, rounded down, and a constant of the task."""
    clip, table = (_shown(cell).text for cell in _cells()[1:3])
    audio, video = map(int, re.findall(r"(\d+) frames of audio, (\d+) of video", clip)[0])
    beside: dict[str, set[int]] = {}
    for task, rates, read in re.findall(r"^(\w+)\(([\d,]+)\) +(\d+)", table, re.MULTILINE):
        each = [int(rate) for rate in rates.split(",")]
        frames = {"asr": [audio], "vsr": [video], "avsr": [audio, video]}[task]
        speech = sum(count // rate for count, rate in zip(frames, each, strict=True))
        beside.setdefault(task, set()).add(int(read) - speech)
    assert len(beside) == 3 and all(len(tags_and_prompt) == 1 for tags_and_prompt in beside.values())


def test_the_page_has_code_text_and_pictures(tmp_path: Path) -> None:
    notebook = read_notebook(NOTEBOOK)
    assert "[notebook.ipynb](notebook.ipynb)" in notebook.markdown and "```text\nview " in notebook.markdown
    for name, picture in notebook.pictures.items():
        assert f"({name})" in notebook.markdown and picture.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", picture[16:24])
        assert 300 < width < 2000 and 200 < height < 2000
    cells: list[dict[str, Any]] = [
        {"cell_type": "markdown", "source": ["# A\n", "\n", "b"]},
        {
            "cell_type": "code",
            "source": ["1"],
            "outputs": [
                {"output_type": "stream", "text": ["x\n", "y\n"]},
                {
                    "output_type": "display_data",
                    "data": {"image/png": base64.b64encode(b"png").decode(), "text/plain": "F"},
                },
                {"output_type": "execute_result", "data": {"text/plain": ["1"]}},
            ],
        },
    ]
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    blocks = ["```python\n1\n```", "```text\nx\ny\n```", "![what the cell draws](n-1.png)", "```text\n1\n```"]
    head = "# A\n\nThis page is a notebook as it was last run: [n.ipynb](n.ipynb).\n\nb"
    assert read_notebook(path).markdown == "\n\n".join([head, *blocks]) + "\n"
    assert read_notebook(path).pictures == {"n-1.png": b"png"}
