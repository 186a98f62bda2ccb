"""Published directories: whole or not at all, skipped when current, never over something foreign."""

from __future__ import annotations

from pathlib import Path

import pytest

from mome_dist.artefact import is_current, publish, read_record
from mome_dist.errors import UserError


def test_publish_replace_and_skip(tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    for steps in (1, 2):
        assert not is_current(out, {"steps": steps, "widths": (1, 2)})
        with publish(out, {"steps": steps, "widths": (1, 2)}, {"accuracy": 0.5}) as directory:
            (directory / "weights").write_text(str(steps))
        assert (out / "weights").read_text() == str(steps)
        assert is_current(out, {"steps": steps, "widths": (1, 2)})
    record = read_record(out)
    assert record is not None and record["results"] == {"accuracy": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_who_may_read_one_file_of_it_may_read_all(tmp_path: Path) -> None:
    with publish(tmp_path / "llm", {"steps": 1}, {}) as directory:
        (directory / "weights").touch(0o600)  # as some writers leave it
        (directory / "folder").mkdir()
        (directory / "folder/more").touch(0o600)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "llm").rglob("*")}
    (tmp_path / "mine").touch()
    (tmp_path / "folder").mkdir()
    assert modes.pop("folder") == (tmp_path / "folder").stat().st_mode
    assert set(modes.values()) == {(tmp_path / "mine").stat().st_mode} and len(modes) == 3


def test_a_failure_leaves_the_old_artefact(tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    with publish(out, {"steps": 1}, {}) as directory:
        (directory / "weights").write_text("old")
    with pytest.raises(RuntimeError, match="disk"), publish(out, {"steps": 2}, {}) as directory:
        (directory / "weights").write_text("new")
        raise RuntimeError("disk")
    assert (out / "weights").read_text() == "old"
    assert is_current(out, {"steps": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_something_foreign_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not made by this command"), publish(tmp_path, {}, {}):
        pass
    assert (tmp_path / "thesis.txt").exists()
