"""The exceptions that command lines tell in one line: a mistake that a user can mend, a lost rank, a stop as asked."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """A wrong config value, file or layout.

    The message is one line that names the key or file, the value found, and the fix. Command lines print it without a
    traceback and exit with code 2 (`mome_dist.cli.main_guard`).
    """


class DamagedDataError(UserError):
    """An utterance cannot be read as its corpus says; a run may be allowed to leave it out."""


class FilmError(UserError):
    """A user's own film or recording cannot be read, or its clock, length or samples are those of no recording."""


class RankLostError(RuntimeError):
    """A collective failed or timed out because of another rank, which the message names.

    Command lines print it without a traceback and exit with code 76; the run can be started again.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an exception of another library says, or its class where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class PreemptedError(Exception):
    """The run was asked to stop and has saved its state; all ranks have agreed on it."""


def no_file(path: str | Path) -> str:
    """What to say of a path that is not the file that it should be: a folder is there, or nothing."""
    return "is a folder, not a file" if Path(path).is_dir() else "does not exist"


def no_folder(path: str | Path) -> str:
    """What to say of a path that is not the folder that it should be: a file is there, or nothing."""
    return "is a file, not a folder" if Path(path).exists() else "does not exist"
