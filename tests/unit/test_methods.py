"""The methods of the family: each composes with every experiment, and trains as many parameters as published."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mome_dist.config import load_config
from mome_dist.config.derived import schedule_of, streams_of, views_of
from mome_dist.config.values import check_values
from mome_dist.evaluation.arithmetic import mome_parameters
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.unrouted import LocalUnrouted
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
        "dense_bottleneck",
        "llama_avsr",
        *(f"llama_mtsk/{form}" for form in ("ms", "mss", "ss")),
        *(f"llama_smop/{form}" for form in ("dedr", "dejr", "jejr")),
        "lora",
        "mome",
        "mome_lora",
        *(f"mome_separate/{by}" for by in ("modality", "rate", "task")),
        *(f"omni_avsr/{form}" for form in ("s", "st", "t")),
    ] == METHODS


@pytest.mark.parametrize("experiment", ["lrs3", "lrs2", "quickstart", "tiny"])
@pytest.mark.parametrize("method", METHODS)
def test_each_goes_with_every_experiment(method: str, experiment: str) -> None:
    config = load_config([f"experiment={experiment}", f"method={method}"])
    check_values(config)
    assert (config.mome.experts > 0) == method.startswith("mome")
    assert config.mome.placed == method.startswith(("mome", "dense_bottleneck")) == (config.llm.lora is None)
    assert (config.projector.mixture is not None) == method.startswith("llama_smop")


@pytest.mark.parametrize(
    ("method", "llm", "overrides", "expected"),
    [
        ("llama_avsr", "llama-3.1-8b", ["task=asr"], 41_949_184),
        ("llama_avsr", "llama-3.1-8b", ["task=vsr"], 48_240_640),
        ("llama_avsr", "llama-3.1-8b", [], 56_635_392),
        ("llama_mtsk/ms", "llama-3.2-3b", ["llm=llama3_2_3b"], 27_525_120 + 33_599_488),
        ("llama_mtsk/ss", "llama-3.2-3b", ["llm=llama3_2_3b"], 4 * 27_525_120 + 33_599_488),
        ("llama_mtsk/mss", "llama-3.2-3b", ["llm=llama3_2_3b"], 5 * 27_525_120 + 33_599_488),
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
    assert Path(config.llm.path).name == llm
    widths = {stream: WIDE[stream] for stream in streams_of(config)}
    assert job_of(config, find_shape(llm), Clip(), widths, on_gpu=True).trained_parameters == expected


@dataclass(frozen=True)
class Published:
    """What a method's authors set: of arXiv papers and of the commands and code that they released."""

    llm: str
    rank: int | None  # of the LLM's LoRA
    views: str
    epochs: int
    frames: int  # of all GPUs together
    learning_rate: float = 1e-3
    warmup: bool = False
    clipping: float = 10.0
    rank_of_lips: int | None = None  # of AV-HuBERT's LoRA
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    projector: str = "pool"
    layer_norm: bool = True


PAIRS = "avsr(4,2) avsr(4,5) avsr(16,2) avsr(16,5)"
OMNI = Published(
    "llama-3.2-1b",
    64,
    f"asr(4) asr(16) vsr(2) vsr(5) {PAIRS}",
    8,
    3000,
    rank_of_lips=64,
    weights=(1.0, 1.5, 1.0),
    layer_norm=False,
)
STACKED = Published("llama-3.1-8b", 64, "avsr(4,2)", 10, 8000, projector="stack", layer_norm=False)
MTSK = Published("llama-3.2-1b", 64, PAIRS, 8, 3000)
SMOP = Published("llama-3.2-1b", 64, "avsr(4,2)", 10, 3000)
MOME = Published("llama-3.2-3b", None, PAIRS, 10, 24000, warmup=True, clipping=1.0)
LIPS = "vsr(1) vsr(2) vsr(3) vsr(4) vsr(5)"
PUBLISHED = {
    "mome": MOME,
    "mome task=vsr": replace(MOME, learning_rate=5e-4, views=LIPS),
    "dense_bottleneck": MOME,  # a control is trained as what it is compared with
    "dense_bottleneck task=vsr": replace(MOME, learning_rate=5e-4, views=LIPS),
    "llama_avsr": STACKED,
    "llama_avsr task=asr": replace(STACKED, views="asr(3)"),
    "llama_avsr task=vsr": replace(STACKED, learning_rate=5e-4, views="vsr(3)", rank_of_lips=64),
    **{f"llama_mtsk/{form}": MTSK for form in ("ms", "ss", "mss")},
    "llama_mtsk/ms task=asr": replace(MTSK, views="asr(4) asr(8) asr(12) asr(16) asr(20)"),
    "llama_mtsk/ms task=vsr": replace(MTSK, learning_rate=5e-4, views=LIPS, rank_of_lips=64),
    **{f"llama_smop/{form}": SMOP for form in ("dedr", "dejr", "jejr")},
    "llama_smop/dedr task=vsr": replace(SMOP, learning_rate=5e-4, views="vsr(2)"),
    **{f"omni_avsr/{form}": OMNI for form in ("s", "st", "t")},
}


@pytest.mark.parametrize("experiment", ["lrs3", "lrs2"])
@pytest.mark.parametrize("method", PUBLISHED)
def test_settings_are_those_of_the_authors(method: str, experiment: str) -> None:
    config = load_config([f"experiment={experiment}", *f"method={method}".split()])
    llm, optimizer, lips, lora = (
        Path(config.llm.path).name,
        config.optimizer,
        config.video_encoder.lora,
        config.llm.lora,
    )
    found = Published(
        llm=llm,
        rank=None if lora is None else lora.rank_of(find_shape(llm).hidden_size),
        views=" ".join(map(str, views_of(config))),
        epochs=config.training.epochs or 0,
        frames=config.data.max_frames or 0,
        learning_rate=optimizer.learning_rate,
        warmup=optimizer.warmup_steps > 0,
        clipping=optimizer.gradient_clipping,
        rank_of_lips=None if lips is None else lips.rank,
        weights=(config.task.weights.asr, config.task.weights.vsr, config.task.weights.avsr),
        projector=config.projector.compression,
        layer_norm=config.projector.layer_norm,
    )
    assert found == PUBLISHED[method]
    # What all of the family share.
    assert (optimizer.name, optimizer.betas, optimizer.weight_decay) == ("adamw", [0.9, 0.98], 0.1)
    assert Path(config.audio_encoder.path).name == "whisper-medium.en" and config.augmentation.crop == 88
    assert Path(config.video_encoder.path).name == "avhubert-large" and config.data.corpus.endswith(experiment)
    assert (config.decoding.num_beams, config.decoding.max_new_tokens) == (15, 32)
    if lora is not None:
        assert (lora.scale, lora.start, optimizer.final_fraction) == (0.125, "b_random", 0)
        assert config.audio_encoder.normalize and (lips is None or lips.alpha / lips.rank == 2)


def test_published_settings_give_way_to_the_command_line_and_to_other_experiments() -> None:
    given = ["llm=qwen2_5_0_5b", "optimizer.learning_rate=1e-4", "training.epochs=2", "llm.lora.start=a_random"]
    config = load_config(["experiment=lrs3", "method=omni_avsr/st", *given])
    assert Path(config.llm.path).name == "qwen2.5-0.5b" and config.llm.tags.audio_open == "<|object_ref_start|>"
    assert (config.optimizer.learning_rate, config.training.epochs, config.data.max_frames) == (1e-4, 2, 3000)
    assert config.llm.lora is not None and config.llm.lora.start == "a_random"
    tiny = load_config(["experiment=tiny", "method=omni_avsr/st"])
    assert Path(tiny.llm.path).name == "tiny" and tiny.data.max_frames is None


@pytest.mark.parametrize("placement", ["mhsa", "ffn"])
def test_the_dense_control_trains_as_many_parameters_as_mome(placement: str) -> None:
    config = load_config(["experiment=lrs3", "method=dense_bottleneck", f"mome.placement={placement}"])
    hidden, b = 3072, config.mome.bottleneck
    with torch.device("meta"):
        dense = LocalUnrouted(hidden, config.mome.shared_experts, b, config.mome.expert)
        mome = LocalMoME(hidden, 23, 4, 1, 12)
    numbers, of_mome = (sum(p.numel() for p in module.parameters()) for module in (dense, mome))
    assert numbers == 2 * hidden * b + b + hidden == 623 * hidden + 311 and of_mome == 623 * hidden + 288
    assert mome_parameters(config, hidden, 28) == (28 * numbers, 28 * numbers)


def test_rates_and_weights_are_those_of_the_papers() -> None:
    assert [str(view) for view in views_of(load_config(["method=llama_avsr"]))] == ["avsr(4,2)"]
    assert [str(view) for view in views_of(load_config(["method=llama_avsr", "task=vsr"]))] == ["vsr(3)"]
    assert len(views_of(load_config(["method=llama_mtsk/ms"]))) == 4
    assert len(views_of(load_config(["method=llama_mtsk/ms", "task=asr"]))) == 5
    for form in ("ms", "ss", "mss"):  # every pair in every step, though the experiment would draw two
        schedule = schedule_of(load_config(["experiment=tiny", f"method=llama_mtsk/{form}"]))
        assert len(schedule.of_step(0)) == 4
    omni = load_config(["experiment=tiny", "method=omni_avsr/st"]).task
    assert (omni.sampling, omni.weights.asr, omni.weights.vsr, omni.weights.avsr) == ("rates", 1, 1.5, 1)
