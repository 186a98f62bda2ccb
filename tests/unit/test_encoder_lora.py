"""LoRA of a run's encoders, before anything trains: what is refused, how its parameters are ordered and counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mome_dist.commands import features as cache_features
from mome_dist.config import load_config
from mome_dist.config.derived import lora_of
from mome_dist.config.schema import RunConfig
from mome_dist.config.values import LORA_TARGETS, check_values
from mome_dist.data.encoding import load_encoder
from mome_dist.engine.deepspeed_names import ModelTensors
from mome_dist.errors import UserError
from mome_dist.parallel.layout import Layout
from mome_dist.planning.job import Candidate, Clip, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.planning.memory import FP32, memory
from mome_dist.speech.lora import LoRATerms, lora_layers
from mome_dist.verification.encoders import trained_encoders
from tests.encoder_directories import encoder_directories

ONLINE = ["experiment=tiny", "data.features=online"]
EVERYWHERE = {stream: f"{{rank: 3, targets: [{', '.join(names)}]}}" for stream, names in LORA_TARGETS.items()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["video_encoder.lora={alpha: 3}"], r"video_encoder\.lora\.rank=0: must be at least 1"),
        (["audio_encoder.lora={rank: -1}"], r"audio_encoder\.lora\.rank=-1: must be at least 1"),
        (["video_encoder.lora={rank: 4, alpha: 0}"], r"video_encoder\.lora\.alpha=0.0: must be above 0"),
        (["video_encoder.lora={rank: 4, alpha: inf}"], r"video_encoder\.lora\.alpha=inf: must be above 0"),
        (
            ["video_encoder.lora={rank: 4, targets: [q_proj, fc1]}"],
            r"targets=\['q_proj', 'fc1'\]: choose from q_",
        ),
        (["audio_encoder.lora={rank: 4, targets: []}"], r"audio_encoder\.lora\.targets=\[\]: choose from q_proj"),
        (
            ["video_encoder.lora={rank: 4}", "task=asr"],
            r"task\.tasks=\['asr'\] reads no video: set video_encoder\.lora",
        ),
        (
            ["video_encoder.lora={rank: 4}", "data.features=cached"],
            r"data\.features=cached reads .* set data\.features=online, or video_encoder\.lora=null",
        ),
    ],
)
def test_wrong_settings_are_named(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_values(load_config([*ONLINE, *settings]))


@pytest.mark.parametrize("stream", EVERYWHERE)
def test_encoders_of_verifications_have_all_layers_that_may_be_named(stream: str) -> None:
    config = load_config([*ONLINE, f"{stream}_encoder.lora={EVERYWHERE[stream]}"])
    encoder = trained_encoders(config, {stream: 8})[stream]
    assert set(lora_layers(encoder)) == set(LORA_TARGETS[stream])


def test_features_of_an_encoder_that_trains_are_not_cached(
    encoders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache_features.main([*ONLINE, *encoders, "audio_encoder.lora={rank: 4}"]) == 2
    said = capsys.readouterr().err
    assert "audio_encoder.lora is set, but the features of an encoder that trains change with every step" in said
    assert "set audio_encoder.lora=null" in said


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small Whisper and a small AV-HuBERT."""
    return encoder_directories(tmp_path_factory.mktemp("encoders"), layers=11)


@pytest.fixture
def config(encoders: list[str]) -> RunConfig:
    """A run that adapts every layer that may be adapted."""
    return load_config([*ONLINE, *encoders, *(f"{stream}_encoder.lora={lora}" for stream, lora in EVERYWHERE.items())])


def _terms(config: RunConfig) -> LoRATerms:
    return LoRATerms({stream: load_encoder(config, stream, torch.device("cpu")) for stream in ("audio", "video")})


def test_the_parameters_are_the_encoders_own(config: RunConfig) -> None:
    encoder = load_encoder(config, "video", torch.device("cpu"))
    terms = LoRATerms.of({"video": encoder})
    assert terms is not None
    own = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("video.") for name, _ in terms.named_parameters()} == own
    assert all(encoder.get_parameter(name.removeprefix("video.")) is value for name, value in terms.named_parameters())
    assert LoRATerms.of({"video": nn.Linear(2, 2)}) is None


def test_engines_hold_them_in_the_order_that_conversions_expect(config: RunConfig) -> None:
    named = {f"lora.{name}": tuple(value.shape) for name, value in _terms(config).named_parameters()}
    assert any(".layers.10." in name for name in named), "a number of two digits, which sorts before 2 as a text"
    model = ModelTensors({"mome.0.router_weight": (2, 8), **dict(sorted(named.items()))})
    assert [parameter.local for parameter in model.whole_modules()] == list(named)


def test_the_planner_counts_them_on_the_first_stage(config: RunConfig) -> None:
    built = sum(parameter.numel() for parameter in _terms(config).parameters())
    job = job_of(config, find_shape("llama-3.1-8b"), Clip(), {"audio": 32, "video": 32}, on_gpu=True)
    without = replace(job, encoders=tuple(replace(encoder, lora_parameters=0) for encoder in job.encoders))
    assert sum(encoder.lora_parameters for encoder in job.encoders) == built
    assert job.trained_parameters - without.trained_parameters == built
    candidate = Candidate(Layout.for_world(4, pp=2), 1, "gather", 1)
    first, last = (
        memory(job, candidate, stage).moments - memory(without, candidate, stage).moments for stage in (0, 1)
    )
    assert (first, last) == (2 * FP32 * built / 2, 0)  # two moments, over two data-parallel ranks


def test_the_planner_needs_the_encoder(config: RunConfig, tmp_path: Path) -> None:
    assert set(lora_of(config)) == {"audio", "video"}
    config.video_encoder.path = str(tmp_path)
    with pytest.raises(
        UserError,
        match=r"config\.json does not say how large .*set video_encoder\.path to the encoder, or .*avhubert-large",
    ):
        job_of(config, find_shape("llama-3.1-8b"), Clip(), {"audio": 32, "video": 32}, on_gpu=True)
