"""Parts of the reference that are made of the code: every key, every command, every exit code."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from mome_dist import exit_codes
from mome_dist.commands.registry import COMMANDS, Command
from mome_dist.config.described import Described, choices, of_dataclass, of_launcher, of_run, options
from mome_dist.evaluation.request import EvaluationRequest
from mome_dist.launchers.options import LocalOptions, SlurmOptions, SubmititOptions

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {"local": LocalOptions, "slurm": SlurmOptions, "submitit": SubmititOptions}


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _plain(text: str) -> str:
    """Words of a comment as Markdown: no angle bracket is a tag, and no star or underscore changes the type."""
    parts = text.split("`")  # every second one is code
    parts[::2] = (re.sub(r"([*_])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2])
    return "`".join(parts)


def _keys(described: Iterable[Described]) -> str:
    rows = (
        (
            f"`{key.name}`",
            _code(key.default),
            key.values if key.values != "section" else "",
            _plain(key.comment.replace("``", "`")),
        )
        for key in described
    )
    return _table(("key", "default", "takes", "what it does"), rows)


def configuration() -> str:
    """Groups, and every key of a run, of the launchers and of an evaluation."""
    parts = ["## Groups", "`group=option` chooses a file of `configs/GROUP`.", _groups()]
    for section, described in groupby(of_run(), key=lambda key: key.name.partition(".")[0] if "." in key.name else ""):
        rows = list(described)
        parts += [f"## {section or 'The run itself'}", _keys(rows)]
    parts += ["## Launchers", "Keys of `mome-dist launch` and of `launch slurm` and `launch submitit`."]
    for name, schema in LAUNCHERS.items():
        parts += [f"### launcher: {name}", _keys(of_launcher(name, schema))]
    parts += ["## Evaluation", "Keys of `mome-dist evaluate`; `null`: as the run's own configuration has it."]
    parts.append(_keys(of_dataclass(EvaluationRequest)))
    return "\n\n".join(parts)


def _groups() -> str:
    rows = []
    for group, chosen in choices().items():
        for option, said in options(group).items():
            default = " (default)" if option == chosen else ""
            rows.append((f"`{group}={option}`{default}", _plain(said)))
    return _table(("option", "what it is"), rows)


def commands() -> str:
    """A table of all commands, then the help of each."""
    parts = []
    for group, members in groupby(COMMANDS, key=lambda command: command.group):
        rows = [(f"[`mome-dist {one.name}`](#mome-dist-{one.name.replace(' ', '-')})", one.what) for one in members]
        parts.append(f"**{group}**\n\n{_table(('command', 'what it does'), rows)}")
    for command in COMMANDS:
        parts.append(f"## mome-dist {command.name}\n\n{_help(command)}")
    return "\n\n".join(parts)


def _help(command: Command) -> str:
    """What a command's module says of itself: sentences, with examples as blocks."""
    path = ROOT / Path(*command.module.split(".")).with_suffix(".py")
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    blocks = re.split(r"\n\s*\n", said)
    return "\n\n".join(_block(block) for block in blocks)


def _block(block: str) -> str:
    if block.startswith("    "):
        return "```text\n" + "\n".join(line.removeprefix("    ") for line in block.splitlines()) + "\n```"
    return _plain(block.replace("``", "`"))


def exits() -> str:
    """Every exit code with the comment behind it."""
    again = {exit_codes.PREEMPTED: "yes, unless the launcher itself was asked", exit_codes.RANK_LOST: "yes"}
    rows = [("0", "done", "")]
    rows += [(str(code), said, again.get(code, "no")) for code, said in _commented_codes()]
    return _table(("exit code", "meaning", "`--restarts` starts again"), rows)


def _commented_codes() -> Iterator[tuple[int, str]]:
    source = Path(exit_codes.__file__).read_text(encoding="utf-8")
    for name, code, said in re.findall(r"^([A-Z_]+) = (\d+)  # (.*)$", source, re.MULTILINE):
        assert getattr(exit_codes, name) == int(code)
        yield int(code), said


def tables() -> str:
    """Links to all committed tables, by what each says at its top."""
    paths = sorted((ROOT / "benchmarks/results").glob("*.md"))
    titles = (path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in paths)
    return "\n".join(f"- [{title}](results/{path.name})" for title, path in zip(titles, paths, strict=True))


PAGES: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "commands": commands,
    "exit-codes": exits,
    "tables": tables,
}
