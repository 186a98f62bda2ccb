"""Every method of the family trains, resumes at another layout and decodes, or says what it needs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mome_dist.config import load_config
from mome_dist.config.derived import views_of
from mome_dist.errors import UserError
from mome_dist.export.adapter import export_adapter
from mome_dist.inference.load import load_run
from mome_dist.preflight import validate
from tests.parallel.runs import Lab
from tests.unit.test_methods import METHODS

EQUALLY_WIDE = ("llama_smop/jejr", "llama_smop/dejr")  # which these encoders are not


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(EQUALLY_WIDE)))
def test_each_trains_resumes_and_decodes(lab: Lab, tmp_path: Path, method: str) -> None:
    settings = [f"method={method}", "training.save_every=2", "optimizer.final_fraction=1"]
    whole = lab.train(1, tmp_path / "whole", *settings, "training.steps=4")
    first = lab.train(2, tmp_path / "run", *settings, "training.steps=2")
    rest = lab.train(2, tmp_path / "run", *settings, "training.steps=4", tp=2)
    assert all(map(math.isfinite, whole)) and len(whole) == 4
    assert first + rest == pytest.approx(whole, rel=1e-5)
    run = load_run(tmp_path / "run")
    assert run.step == 4 and run.views == views_of(load_config(lab.overrides(tmp_path, *settings)))


def test_an_export_goes_through_peft_into_another_run(lab: Lab, tmp_path: Path) -> None:
    lab.train(2, tmp_path / "run", "method=llama_mtsk/mss", "training.steps=3")
    export_adapter(tmp_path / "run", tmp_path / "export")
    pairs = ["4_2", "4_5", "16_2", "16_5"]
    assert {path.name for path in (tmp_path / "export/peft").iterdir()} == {f"shared+avsr_{pair}" for pair in pairs}
    lab.train(2, tmp_path / "first", "method=lora", "training.steps=3")
    export_adapter(tmp_path / "first", tmp_path / "shared")
    still = ("training.steps=1", "optimizer.learning_rate=1e-30")  # weights stay what they were
    begin = f"training.init_from={tmp_path}/shared/peft/shared"
    lab.train(2, tmp_path / "second", "method=llama_mtsk/mss", begin, *still, tp=2)
    before, after = (load_run(tmp_path / name).model.state_dict() for name in ("first", "second"))
    names = [name for name in before if ".shared." in name]
    assert len(names) == 4 * 2 * 2 and all(torch.equal(before[name], after[name]) for name in names)


@pytest.mark.parametrize("method", EQUALLY_WIDE)
def test_streams_of_other_widths_are_refused_by_name(lab: Lab, tmp_path: Path, method: str) -> None:
    config = load_config(lab.overrides(tmp_path, f"method={method}"))
    with pytest.raises(UserError, match=rf"projector\.mixture\.form={method.rpartition('/')[2]}"):
        validate(config, 1)
