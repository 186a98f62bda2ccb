"""The methods of the family: each composes with every experiment, and trains as many parameters as published."""

from __future__ import annotations

from pathlib import Path

import pytest

from mome_dist.config import load_config
from mome_dist.config.derived import streams_of, views_of
from mome_dist.config.values import check_values
from mome_dist.paths import configs_dir
from mome_dist.planning.job import Clip, job_of
from mome_dist.planning.llms import find_shape

METHODS = sorted(
    path.relative_to(configs_dir() / "method").with_suffix("").as_posix()
    for path in Path(configs_dir() / "method").rglob("*.yaml")
)
WIDE = {"audio": 1024, "video": 1024}  # Whisper medium, AV-HuBERT large


def test_the_methods_are_those_of_the_family() -> None:
    assert [
        "llama_avsr",
        *(f"llama_mtsk/{form}" for form in ("ms", "mss", "ss")),
        *(f"llama_smop/{form}" for form in ("dedr", "dejr", "jejr")),
        "lora",
        "mome",
        *(f"omni_avsr/{form}" for form in ("s", "st", "t")),
    ] == METHODS


@pytest.mark.parametrize("experiment", ["lrs3", "lrs2", "quickstart", "tiny"])
@pytest.mark.parametrize("method", METHODS)
def test_each_goes_with_every_experiment(method: str, experiment: str) -> None:
    config = load_config([f"experiment={experiment}", f"method={method}"])
    check_values(config)
    assert (config.mome.experts > 0) == (method == "mome") == (config.llm.lora is None)
    assert (config.projector.mixture is not None) == method.startswith("llama_smop")


@pytest.mark.parametrize(
    ("method", "llm", "overrides", "expected"),
    [
        ("llama_avsr", "llama-3.1-8b", ["task=asr", "llm.lora.reduction=64"], 41_949_184),
        (
            "llama_avsr",
            "llama-3.1-8b",
            ["task=vsr", "llm.lora.reduction=64", "video_encoder.lora={rank: 64, alpha: 128}"],
            48_240_640,
        ),
        ("llama_avsr", "llama-3.1-8b", ["llm.lora.reduction=64"], 56_635_392),
        ("llama_mtsk/ms", "llama-3.2-3b", [], 27_525_120 + 33_599_488),
        ("llama_mtsk/ss", "llama-3.2-3b", [], 4 * 27_525_120 + 33_599_488),
        ("llama_mtsk/mss", "llama-3.2-3b", [], 5 * 27_525_120 + 33_599_488),
        ("llama_mtsk/mss", "llama-3.2-1b", [], 5 * 6_815_744 + 25_198_592),
        ("llama_smop/jejr", "llama-3.2-1b", [], 6_815_744 + 25_202_688),
        ("llama_smop/dejr", "llama-3.2-1b", [], 6_815_744 + 50_401_280),
        ("llama_smop/dedr", "llama-3.2-1b", [], 6_815_744 + 50_405_376),
        ("omni_avsr/s", "llama-3.2-1b", [], 38_289_408),
        ("omni_avsr/t", "llama-3.2-1b", [], 51_920_896),
        ("omni_avsr/st", "llama-3.2-1b", [], 58_736_640),
    ],
)
def test_as_many_parameters_train_as_published(method: str, llm: str, overrides: list[str], expected: int) -> None:
    config = load_config(["experiment=lrs3", f"method={method}", *overrides])
    widths = {stream: WIDE[stream] for stream in streams_of(config)}
    assert job_of(config, find_shape(llm), Clip(), widths, on_gpu=True).trained_parameters == expected


def test_rates_and_weights_are_those_of_the_papers() -> None:
    assert [str(view) for view in views_of(load_config(["method=llama_avsr"]))] == ["avsr(4,2)"]
    assert [str(view) for view in views_of(load_config(["method=llama_avsr", "task=vsr"]))] == ["vsr(3)"]
    assert len(views_of(load_config(["method=llama_mtsk/ms"]))) == 4
    assert len(views_of(load_config(["method=llama_mtsk/ms", "task=asr"]))) == 5
    omni = load_config(["experiment=tiny", "method=omni_avsr/st"]).task
    assert (omni.sampling, omni.weights.asr, omni.weights.vsr, omni.weights.avsr) == ("rates", 1, 1.5, 1)
