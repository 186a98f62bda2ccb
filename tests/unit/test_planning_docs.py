"""The plans printed in docs/planning.md are what their commands print.

``python -m tests.unit.test_planning_docs`` runs the commands and writes the page anew.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from mome_dist.commands import plan as plan_layout

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
EXAMPLE = re.compile(r"```bash\nmome-dist plan ([^\n]*)\n```\n\n```text\n(.*?)```", re.DOTALL)


def documented_commands() -> list[str]:
    """The commands of the page."""
    return [f"mome-dist plan {arguments}" for arguments, _ in EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))]


def _output(arguments: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert plan_layout.main(shlex.split(arguments)) == 0
    return "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())


@pytest.mark.parametrize("number", range(3))
def test_the_page_shows_what_its_commands_print(number: int) -> None:
    examples = EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(examples) == 3
    arguments, shown = examples[number]
    assert shown == _output(arguments), "run: python -m tests.unit.test_planning_docs"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        EXAMPLE.sub(lambda m: f"```bash\nmome-dist plan {m[1]}\n```\n\n```text\n{_output(m[1])}```", text),
        encoding="utf-8",
    )
