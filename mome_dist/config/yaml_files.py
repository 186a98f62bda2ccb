"""YAML files that users edit: what is wrong with one is told in a line that names the file and the place in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from mome_dist.errors import UserError, first_line
from mome_dist.text_files import lines_of

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the fast one, where PyYAML was built with it


def read_yaml(path: Path) -> tuple[str, yaml.Node | None]:
    """The text of a YAML file and its nodes, whose marks count the lines that ``str.splitlines`` finds in the text:
    YAML refuses the characters that end a line for one of them alone.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or not YAML.
    """
    text = "\n".join(lines_of(path))
    try:
        return text, yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise UserError(_told(error, str(path))) from error


@contextmanager
def told_by_file(files: Iterable[Path]) -> Iterator[None]:
    """Say which of these files is at fault where one that is read inside is no YAML.

    Raises:
        UserError: naming the file and the line.
    """
    try:
        yield
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        for path in sorted(files):
            read_yaml(path)
        if isinstance(error, yaml.YAMLError):  # such as a key that stands twice
            raise UserError(_told(error)) from error
        raise


def _told(error: yaml.YAMLError, file: str | None = None) -> str:
    """One line on an error, which knows its file itself unless it is of a text."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{file or getattr(error, 'name', 'a YAML file')}: not YAML: {first_line(error)}"
    return f"{file or mark.name}:{mark.line + 1}: not YAML: {getattr(error, 'problem', None) or first_line(error)}"
