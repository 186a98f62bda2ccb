"""Weights & Biases without internet, for real: what `wandb` writes when a run starts, is stopped and goes on."""

from __future__ import annotations

import json
import os
import pwd
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from mome_dist.config.load import load_config
from mome_dist.config.schema import RunConfig
from mome_dist.config.values import check_texts
from mome_dist.errors import UserError
from mome_dist.preflight import check_wandb
from mome_dist.training.wandb_log import ID, WandbRun
from mome_dist.versions import commit_here
from tests.patience import patience

KEY = "0123456789abcdef" * 2 + "01234567"  # of the form that an account has
BLOCK, FULL, LAST = 32768, 1, 4  # of LevelDB's log
MINE = ["training.wandb_project=lips", "training.wandb_entity=us", "training.wandb_group=seeds"]
MINE += ["training.wandb_tags=[a,b]", "training.wandb_mode=offline", "name=mine"]


def config_of(folder: Path, *more: str) -> RunConfig:
    return load_config(["experiment=tiny", f"output_dir={folder}", *MINE, *more])


def records_of(path: Path) -> list[Any]:
    """The records of a ``.wandb`` file: a header of 7 bytes, then LevelDB's log of serialised messages."""
    data, at, found, part = path.read_bytes(), 7, [], b""
    assert data.startswith(b":W&B")
    while at < len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left  # what is too short for a header is left empty
            continue
        length, kind = (
            struct.unpack_from("<HB", data, at + 4) if at + 7 <= len(data) else (BLOCK, 0)
        )  # after a checksum
        if at + 7 + length > len(data):
            break  # it is being written
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            found.append(wandb_internal_pb2.Record.FromString(part))  # type: ignore[attr-defined]
            part = b""
    return found


def written(folder: Path) -> list[list[Any]]:
    """The records of every start, in their order. A process of wandb's own writes them, and may come after `finish`."""
    files, deadline = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")), time.monotonic() + patience(30)
    while not all(any(record.HasField("exit") for record in records_of(path)) for path in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.1)
    return [records_of(path) for path in files]


def runs_of(records: list[Any]) -> Any:
    (run,) = [record.run for record in records if record.HasField("run")]
    return run


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    lines = [record.history.item for record in records if record.HasField("history")]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in line} for line in lines]


def test_a_directory_is_one_run_however_often_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path))  # which whoever runs the tests need not have
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for steps in ((1, 2), (2, 3)):  # the second start goes on from a checkpoint of step 1
        run = WandbRun(config_of(tmp_path))
        for step in steps:
            run.log({"train/loss": 1 / step}, step)
            run.log({"validation/asr(4)": 2.0}, step)
        run.finish()
    first, second = written(tmp_path)
    for records in (first, second):
        about = runs_of(records)
        assert (about.project, about.entity, about.run_group, about.display_name) == ("lips", "us", "seeds", "mine")
        assert list(about.tags) == ["a", "b"]
        assert about.run_id == (tmp_path / ID).read_text()
        values = {item.key: json.loads(item.value_json) for item in about.config.update}
        assert values["commit"] == commit_here() and values["versions"]["mome_dist"]
        assert values["optimizer"]["learning_rate"] == config_of(tmp_path).optimizer.learning_rate
        assert values["training"]["wandb_group"] == "seeds" and values["llm"]["path"]
    steps_of = [[line["_step"] for line in history_of(records)] for records in (first, second)]
    assert steps_of == [[1, 2], [2, 3]]
    assert {"train/loss", "validation/asr(4)"} <= history_of(first)[0].keys()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path

    again = WandbRun(config_of(tmp_path, "training.resume=false"))
    again.finish()
    new = (tmp_path / ID).read_text()
    assert new != about.run_id and list((tmp_path / "wandb").glob(f"offline-run-*-{new}")), "another run"


def test_without_an_account_a_line_says_what_to_do(tmp_path: Path) -> None:
    """In a process of its own: this one has a key by now."""
    code = (
        "import sys; from tests.unit.test_wandb import *\n"
        "try: WandbRun(config_of(Path(sys.argv[1]), 'training.wandb_mode=online'))\n"
        "except UserError as error: print('told:', error)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path)}  # where a key would be
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert re.search(
        r"^told: training\.wandb_project=lips: W&B did not start .*`wandb login`", done.stdout, re.M | re.S
    ), done.stdout + done.stderr


def test_a_user_without_a_home_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as in a container that runs under a number
    with pytest.raises(UserError, match=r"wandb_project='lips': .* HOME is not set and user \d+ has none: set HOME"):
        check_wandb("lips")
    check_wandb(None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.wandb_project=us/lips", r"training\.wandb_project='us/lips': .* training\.wandb_entity"),
        ("training.wandb_project=null", r"training\.wandb_entity=us is of a run .* training\.wandb_project"),
        ("training.wandb_tags=['']", r"training\.wandb_tags\[0\] is empty"),
        (f"training.wandb_tags=[{'a' * 65}]", "longer than 64"),
        ("training.wandb_group=''", r"training\.wandb_group is empty"),
    ],
)
def test_what_it_would_refuse_is_told_before(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_texts(config_of(tmp_path, override))
