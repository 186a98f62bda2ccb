"""The measuring part of `benchmarks.gpu.decode`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.models import PAPER, TINY, WEIGHT_SCALE, Sizes, configuration, random_projectors
from benchmarks.measuring import CPU, interleaved, median_milliseconds
from mome_dist.config.derived import views_of
from mome_dist.config.schema import DecodingConfig, RunConfig
from mome_dist.data.media import FPS
from mome_dist.evaluation.decoding import decode_batch
from mome_dist.model.shared import build_sequences, mome_arguments
from mome_dist.planning.encoder_shapes import AUDIO_FRAMES, encoder_shape
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.sequence import SequenceBuilder
from mome_dist.speech.views import View

# (clips at once, beams)
SEARCHES = ((1, 1), (8, 1), (1, 15))
PARITY_SEARCHES = ((4, 1), (4, 5))
MOME_SCALE = 0.3  # of what is added to the modules' initial values, where experts add nothing yet


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Speed of every search with MoME and without, and equality of the tokens that two devices write."""
    sizes = TINY if options.tiny else PAPER
    tokens = 4 if options.tiny else options.tokens
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(sizes, Path(folder))
        speed = _speed(config, sizes, tokens, options, device)
    small = TINY if options.tiny else replace(TINY, llm=replace(TINY.llm, hidden_size=256, ffn_size=512, layers=4))
    with tempfile.TemporaryDirectory() as folder:
        parity = _parity(configuration(small, Path(folder)), small, tokens, device)
    return {"tokens": tokens, "speed": speed, "parity": parity}


def random_model(config: RunConfig, dtype: torch.dtype, device: torch.device, with_mome: bool = True) -> MoMESpeechLM:
    """The one-process form of the model, made on the device; its experts add something."""
    with device:
        torch.manual_seed(0)
        llm = LlamaForCausalLM(LlamaConfig.from_pretrained(config.llm.path)).to(dtype)
        projectors = random_projectors(config)
        model = MoMESpeechLM(llm, projectors, config.mome.placement, **mome_arguments(config)).eval()
    model.initialize(config.seed, WEIGHT_SCALE)
    with torch.no_grad():
        for parameter in model.mome.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=MOME_SCALE * parameter.shape[-1] ** -0.5)
    if not with_mome:
        for layer in llm.model.layers:
            for module in (layer, layer.self_attn, layer.mlp):
                module._forward_hooks.clear()  # by which a module is attached
    return model


def random_features(config: RunConfig, sizes: Sizes, clips: int) -> dict[str, list[Tensor]]:
    """Features of so many clips by stream, on the host."""
    generator, rates = torch.Generator().manual_seed(1), {"audio": AUDIO_FRAMES, "video": FPS}
    return {
        stream: [
            torch.randn(int(sizes.seconds * rate), encoder_shape(config, stream).width, generator=generator)
            for _ in range(clips)
        ]
        for stream, rate in rates.items()
    }


def _search(
    model: MoMESpeechLM,
    sequences: SequenceBuilder,
    view: View,
    features: dict[str, list[Tensor]],
    clips: int,
    decoding: DecodingConfig,
) -> list[list[int]]:
    audio, video = (features[stream][:clips] for stream in ("audio", "video"))
    return decode_batch(model, sequences, view, audio, video, decoding)


def _speed(
    config: RunConfig, sizes: Sizes, tokens: int, options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    plain, mome = (random_model(config, torch.bfloat16, device, with_mome) for with_mome in (False, True))
    forms = {"LLM": (plain, False), "with MoME": (mome, False)}
    if options.static_cache:
        forms["with MoME, static cache"] = mome, True
    sequences, view = build_sequences(config), views_of(config)[0]
    features = random_features(config, sizes, max(clips for clips, _ in SEARCHES))
    found = []
    for clips, beams in SEARCHES:
        written: dict[str, int] = {}
        runs = {}
        for name, (model, static) in forms.items():
            decoding = DecodingConfig(num_beams=beams, max_new_tokens=tokens, static_cache=static)
            search = partial(_search, model, sequences, view, features, clips, decoding)
            runs[name] = partial(_counted, written, name, search)
        timings = interleaved(runs, options.rounds, device, options.warm_up)
        for name, rounds in timings.items():
            milliseconds = median_milliseconds(each.device for each in rounds)
            found.append(
                {
                    "model": name,
                    "clips": clips,
                    "beams": beams,
                    "milliseconds": milliseconds,
                    "tokens": written[name],
                    "tokens a second": written[name] / milliseconds * 1e3,
                }
            )
    return found


def _counted(written: dict[str, int], name: str, search: Callable[[], list[list[int]]]) -> None:
    """Search, and keep how many tokens were written."""
    written[name] = sum(map(len, search()))


def _parity(config: RunConfig, sizes: Sizes, tokens: int, device: torch.device) -> list[dict[str, Any]]:
    """Whether the same weights in fp32 write the same tokens on the device and on the CPU."""
    here, there = (random_model(config, torch.float32, CPU) for _ in range(2))  # the same, from the same seed
    there.llm.to(device)
    there.to(device)
    sequences, features = build_sequences(config), random_features(config, sizes, max(c for c, _ in PARITY_SEARCHES))
    found = []
    for view in views_of(config):
        for clips, beams in PARITY_SEARCHES:
            decoding = DecodingConfig(num_beams=beams, max_new_tokens=tokens)
            both: Sequence[list[list[int]]] = [
                _search(model, sequences, view, features, clips, decoding) for model in (here, there)
            ]
            equal = sum(one == other for one, other in zip(*both, strict=True))
            found.append({"view": str(view), "beams": beams, "clips": clips, "equal": equal})
    return found
