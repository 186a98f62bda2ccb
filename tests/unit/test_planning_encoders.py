"""The planner's encoders against real ones: their products and parameters, and what encoding costs a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mome_dist.assets import asset_dir
from mome_dist.config import load_config
from mome_dist.errors import UserError
from mome_dist.parallel.layout import Layout
from mome_dist.planning.encoder_shapes import EncoderShape, encoder_shape
from mome_dist.planning.encoders import SPECTROGRAM_SECONDS, StepEncoder
from mome_dist.planning.hardware import cluster_of_gpus
from mome_dist.planning.job import Candidate, Clip, Job, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.planning.memory import memory
from mome_dist.planning.search import predict, search
from mome_dist.planning.speed import step_time
from mome_dist.speech.avhubert import AVHubertEncoder
from mome_dist.speech.avhubert.config import AVHubertConfig
from mome_dist.speech.clip_encoder import ClipEncoder
from mome_dist.speech.video_encoder import VideoEncoder
from mome_dist.speech.whisper import WhisperAudioEncoder

NODE = cluster_of_gpus("h100", 1, 8)
LRS3 = ["experiment=lrs3"]


def lrs3(*more: str) -> Job:
    return job_of(load_config([*LRS3, *more]), find_shape("llama-3.2-3b"), Clip(), {"audio": 1024, "video": 1024}, True)


def counted(encoder: nn.Module, clip: torch.Tensor) -> float:
    """FLOP of a forward pass, attention written out so that its products are counted."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder([clip])
    return counter.get_total_flops()


def check(shape: EncoderShape, encoder: nn.Module, clip: torch.Tensor, seconds: float, besides: float = 0) -> None:
    flops = besides + shape.front_flops(seconds) + shape.transformer.flops(shape.frames(seconds))
    # An even kernel of positions is evaluated at one place more.
    assert flops == pytest.approx(counted(encoder, clip), rel=1e-4)
    # Biases and norms are left out.
    assert shape.parameters == pytest.approx(sum(each.numel() for each in encoder.parameters()), rel=0.02)


def test_whisper_is_what_torch_counts() -> None:
    given = [f"audio_encoder.path={asset_dir('whisper-tiny.en')}"]
    encoder = WhisperAudioEncoder.from_pretrained(asset_dir("whisper-tiny.en"), padding="clip")
    encoder.encoder.config._attn_implementation = "eager"
    shape, whole = (
        encoder_shape(load_config([*given, f"audio_encoder.padding={way}"]), "audio") for way in ("clip", "30s")
    )
    # 80 mel filters of the 201 frequencies in each of 200 windows of the two seconds.
    check(shape, encoder, torch.zeros(25_000), 25_000 / 16_000, besides=2 * 201 * 80 * 200)
    assert (shape.frames(1.6), whole.frames(1.6), shape.features(1.6), shape.width) == (100, 1500, 80, 384)


@pytest.mark.parametrize(
    "encoder", [VideoEncoder(), AVHubertEncoder(AVHubertConfig(width=64, layers=2, heads=2, ffn_width=96))]
)
def test_video_encoders_are_what_torch_counts(encoder: ClipEncoder, tmp_path: Path) -> None:
    encoder.freeze().save_pretrained(tmp_path)
    encoder.transformer.config._attn_implementation = "eager"
    shape = encoder_shape(load_config([f"video_encoder.path={tmp_path}"]), "video")
    check(shape, encoder, torch.zeros(12, 96, 96, dtype=torch.uint8), 12 / 25)


@pytest.mark.parametrize(
    ("stream", "path", "millions"),
    [
        # Whisper's encoders, as the published files hold them; AV-HuBERT's as its paper has them.
        ("audio", "whisper-tiny", 8.2),
        ("audio", "whisper-medium.en", 307),
        ("audio", "whisper-large-v3", 637),
        ("video", "avhubert-base", 103),
        ("video", "avhubert-large", 325),
    ],
)
def test_encoders_that_are_not_here_are_known_by_name(stream: str, path: str, millions: float) -> None:
    shape = encoder_shape(load_config([f"{stream}_encoder.path=/nowhere/{path}"]), stream)
    assert shape.parameters / 1e6 == pytest.approx(millions, rel=0.01)


def test_an_unknown_encoder_is_refused_by_name() -> None:
    config = load_config(["audio_encoder.path=/nowhere/mine"])
    with pytest.raises(UserError, match=r"/nowhere/mine/config\.json does not say .* whisper-large-v3"):
        encoder_shape(config, "audio")


def test_cached_features_cost_a_step_nothing() -> None:
    assert len(lrs3().encoders) == 2 and lrs3("task=vsr").encoders[0].shape.stream == "video"
    cached = lrs3("data.features=cached", "augmentation=none")
    candidate = Candidate(Layout.for_world(8), 1, "local", 1)
    assert step_time(cached, candidate, NODE).encoders == memory(cached, candidate, 0).encoders == 0


def test_the_first_stage_encodes_and_each_of_its_ranks_a_share() -> None:
    job = lrs3()
    took = {
        (pp, tp): step_time(job, Candidate(Layout.for_world(8, tp=tp, pp=pp), 1, "local", 1), NODE).encoders
        for pp, tp in ((1, 1), (2, 1), (4, 1), (1, 2))
    }
    assert took[2, 1] == pytest.approx(2 * took[1, 1], rel=0.05)  # half of the ranks encode
    assert took[4, 1] == pytest.approx(4 * took[1, 1], rel=0.05)
    assert took[1, 2] == pytest.approx(took[1, 1], rel=0.01)  # the clips of twice as many, shared by two
    whisper, avhubert = job.encoders
    candidate = Candidate(Layout.for_world(8, pp=2), 1, "local", 1)
    first, last = (memory(job, candidate, stage).encoders for stage in (0, 1))
    features = 40 * 1024 * 2 * (300 + 150)  # clips, width, float16, frames of both streams
    # bf16 weights, and the features of two steps.
    assert (first, last) == (2 * (whisper.shape.parameters + avhubert.shape.parameters) + 2 * features, 0)


def test_encoders_have_a_precision_of_their_own() -> None:
    """Products of 30 s whatever the clip, at the rate of their precision; and of sound, the spectrogram where a CPU
    makes it."""
    (auto,), (whisper,) = (lrs3("task=asr", *way).encoders for way in ((), ("audio_encoder.precision=fp32",)))
    assert (auto.precision, whisper.precision) == ("bf16", "fp32")
    faster = replace(NODE, bf16_flops=10 * NODE.bf16_flops)
    assert whisper.step_seconds(20, faster) == whisper.step_seconds(20, NODE)
    assert auto.step_seconds(20, faster) < 0.5 * auto.step_seconds(20, NODE)
    bound = 20 * 1.14e12 / NODE.fp32_flops
    assert whisper.step_seconds(20, NODE) == pytest.approx(bound, rel=0.07)
    on_cpu = whisper.step_seconds(20, replace(NODE, on_gpu=False)) - whisper.step_seconds(20, NODE)
    assert on_cpu == pytest.approx(20 * 6 * SPECTROGRAM_SECONDS)
    assert (whisper.weight_bytes, whisper.working_bytes(8)) == (2 * auto.weight_bytes, 2 * auto.working_bytes(8))


def test_frozen_encoders_of_gpus_work_beside_the_passes() -> None:
    """Then what they need for a moment comes on top of what is kept of the layers."""
    candidate, beside = Candidate(Layout.for_world(8), 1, "local", 1), lrs3()
    assert all(encoder.beside for encoder in beside.encoders)
    assert not any(encoder.beside for encoder in lrs3("video_encoder.lora={rank: 16}").encoders)
    waiting = replace(beside, encoders=tuple(replace(encoder, beside=False) for encoder in beside.encoders))
    more = memory(beside, candidate, 0).working - memory(waiting, candidate, 0).working
    assert more == max(encoder.working_bytes(20) for encoder in beside.encoders) > 0


def test_lora_encodes_again_and_keeps_a_graph_of_a_few_clips() -> None:
    frozen = lrs3("task=vsr").encoders[0]
    adapted = lrs3("task=vsr", "video_encoder.lora={rank: 16}").encoders[0]
    assert isinstance(adapted, StepEncoder) and adapted.lora_parameters == 24 * 16 * 2 * 2 * 1024
    assert 2 < adapted.step_seconds(20, NODE) / frozen.step_seconds(20, NODE) < 3  # no gradient of the front end
    assert adapted.working_bytes(8) == adapted.working_bytes(80) > 1.5 * frozen.working_bytes(8)


def test_a_step_of_few_views_may_do_without_a_stream() -> None:
    views = ["task=all", "task.views_per_step=1"]  # two of eight views hear, two see, four do both
    assert [encoder.share for encoder in lrs3(*views).encoders] == [0.75, 0.75]
    assert [encoder.share for encoder in lrs3("task=all").encoders] == [1, 1]
    assert [encoder.share for encoder in lrs3("task=omni").encoders] == [1, 1]


def test_a_3b_llm_that_fits_a_gpu_is_not_cut() -> None:
    shares = {}
    for precision in ("fp32", "bf16"):
        job = lrs3(*(f"{stream}_encoder.precision={precision}" for stream in ("audio", "video")))
        best = search(job, NODE).plans[0]
        layout = best.candidate.layout
        assert (layout.tp, layout.pp, layout.ep) == (1, 1, 1)
        # One pass of all four views takes more than half of it; as many passes as views would not.
        in_four = replace(best.candidate, accumulation=4)
        assert best.candidate.accumulation == 1 and predict(job, in_four, NODE).memory.total < NODE.memory / 2
        shares[precision] = best.time.encoders / best.time.total
    assert shares["fp32"] > 1 / 2 and shares["bf16"] < 1 / 4, "in fp32 encoding is more than half of that step"
