"""The measuring part of `benchmarks.gpu.encoders`."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.models import PAPER, TINY, Sizes, configuration, random_encoders
from benchmarks.gpu.training import MOUTH
from benchmarks.measuring import interleaved, median_milliseconds
from mome_dist.data.encoding import Encoder
from mome_dist.data.media import FPS
from mome_dist.speech.whisper import MAX_SECONDS, SAMPLE_RATE, WhisperAudioEncoder
from mome_dist.training.online import CLIPS_TOGETHER

REFERENCE_CLIPS = 2  # that float64 encodes, too


@dataclass(frozen=True)
class Precision:
    """Precision of an encoder's weights, and whether its fp32 products go through TF32."""

    dtype: torch.dtype
    tf32: bool


# torch's default has fp32 products without TF32, and convolutions with it.
DEFAULT = "as torch has it"
PRECISIONS = {
    "fp32": Precision(torch.float32, False),
    "TF32": Precision(torch.float32, True),
    "bf16": Precision(torch.bfloat16, False),
}


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@torch.inference_mode()
def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Errors and milliseconds of both encoders and the spectrogram."""
    sizes = TINY if options.tiny else PAPER
    clips = random_clips(sizes, CLIPS_TOGETHER if not options.tiny else REFERENCE_CLIPS, device)
    with tempfile.TemporaryDirectory() as folder:
        encoders = random_encoders(configuration(sizes, Path(folder)), device)
    figures: dict[str, Any] = {"clips": len(clips["audio"]), "seconds": sizes.seconds, "encoders": {}}
    whisper = encoders["audio"]
    assert isinstance(whisper, WhisperAudioEncoder)
    figures["spectrogram"] = _spectrogram(whisper, clips["audio"], options, device)
    for stream, encoder in encoders.items():
        figures["encoders"][stream] = _precisions(encoder, clips[stream], options, device)
    return figures


def random_clips(sizes: Sizes, count: int, device: torch.device) -> dict[str, list[Tensor]]:
    """Noise, by stream: waveforms on the host, where Whisper wants them, and mouths on the device."""
    generator = torch.Generator().manual_seed(0)
    samples, frames = int(sizes.seconds * SAMPLE_RATE), int(sizes.seconds * FPS)
    audio = [0.1 * torch.randn(samples, generator=generator) for _ in range(count)]
    shape = (frames, MOUTH, MOUTH)
    video = [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device) for _ in range(count)]
    return {"audio": audio, "video": video}


def _spectrogram(
    whisper: WhisperAudioEncoder, clips: Sequence[Tensor], options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of all clips' log-mel spectrogram on the host, and on the device, where training makes it."""

    runs: dict[str, Callable[[], object]] = {"host": lambda: _log_mel(whisper, clips, "cpu")}
    if device.type == "cuda":
        runs["device"] = lambda: _log_mel(whisper, clips, str(device))
    timings = interleaved(runs, options.rounds, device, options.warm_up)
    found: dict[str, Any] = {
        name: median_milliseconds(each.device for each in rounds) for name, rounds in timings.items()
    }
    if device.type == "cuda":
        found["difference"] = _distance(*([_log_mel(whisper, clips, where).cpu()] for where in ("cpu", str(device))))
    return found


def _log_mel(whisper: WhisperAudioEncoder, clips: Sequence[Tensor], where: str) -> Tensor:
    """The spectrograms of clips of one length, as `WhisperAudioEncoder` has them made."""
    seconds = MAX_SECONDS if whisper.padding == "30s" else -(-len(clips[0]) // SAMPLE_RATE)
    return whisper.log_mel([clip.to(where) for clip in clips], seconds)


def _precisions(
    encoder: Encoder, clips: Sequence[Tensor], options: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, float]]:
    """Error against float64, and milliseconds of all clips at once, in each precision."""
    few = clips[:REFERENCE_CLIPS]
    exact = copy.deepcopy(encoder).set_precision(torch.float64)(few)
    forms = {name: copy.deepcopy(encoder).set_precision(way.dtype) for name, way in PRECISIONS.items()}
    found: dict[str, dict[str, float]] = {name: {} for name in (*PRECISIONS, DEFAULT)}
    for name, way in PRECISIONS.items():
        with _tf32(way.tf32):
            found[name]["error"] = _distance(exact, forms[name](few))
    found[DEFAULT]["error"] = _distance(exact, encoder(few))
    runs = {name: _run(forms[name], clips, way.tf32) for name, way in PRECISIONS.items()}
    runs[DEFAULT] = _run(copy.deepcopy(encoder), clips, None)
    for name, rounds in interleaved(runs, options.rounds, device, options.warm_up).items():
        found[name]["milliseconds"] = median_milliseconds(each.device for each in rounds)
        found[name]["host"] = median_milliseconds(each.host for each in rounds)
    return found


def _run(encoder: Encoder, clips: Sequence[Tensor], tf32: bool | None) -> Callable[[], None]:
    """Encode all clips, their spectrograms made beforehand."""
    if isinstance(encoder, WhisperAudioEncoder):
        mel = _log_mel(encoder, clips, str(encoder.encoder.conv1.weight.device))
        encoder.log_mel = lambda *_: mel

    def run() -> None:
        if tf32 is None:
            encoder(clips)
        else:
            with _tf32(tf32):
                encoder(clips)

    return run


def _distance(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The norm of the difference of all features over that of the exact ones."""
    reference, other = (torch.cat([each.double().flatten() for each in features]) for features in (exact, found))
    return float((other - reference).norm() / reference.norm())
