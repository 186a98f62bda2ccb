"""What CONTRIBUTING.md says to write works as it stands."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from mome_dist.adapters.terms import SHARED, TASK
from mome_dist.config import load, load_config
from mome_dist.config.values import check_values
from mome_dist.paths import configs_dir
from tests.quickstart.newcomer import ROOT
from tools import verify_layouts

PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def test_a_method_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = re.findall(r"`configs/method/(\w+)\.yaml`", PAGE)
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    shutil.copytree(configs_dir(), tmp_path / "configs")
    (tmp_path / f"configs/method/{name}.yaml").write_text(text)
    monkeypatch.setattr(load, "configs_dir", lambda: tmp_path / "configs")
    config = load_config(["experiment=tiny", f"method={name}"])
    check_values(config)
    assert config.llm.lora is not None and config.llm.lora.terms == [SHARED, TASK] and not config.mome.experts
    assert (config.task.weights.asr, config.task.weights.vsr) == (1, 2) and config.task.tasks == ["asr", "vsr", "avsr"]


def test_its_command_is_understood() -> None:
    (command,) = re.findall(r"^python tools/verify_layouts\.py (.*)$", PAGE, re.M)
    options = verify_layouts.parse_arguments(shlex.split(command))
    check_values(load_config(options.overrides))
