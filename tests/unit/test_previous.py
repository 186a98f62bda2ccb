"""Experts that read what the layer before has beside it: ScMoE's shortcut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from mome_dist.config import RunConfig, load_config
from mome_dist.config.derived import check_reads
from mome_dist.errors import UserError
from mome_dist.model.shared import build_reference
from mome_dist.parallel.layout import Layout
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.views import View
from mome_dist.verification.probe import WIDTHS, shrunk, wake_reference, write_random_llama
from tests.probes import OVERRIDES


def _config(folder: Path, reads: str, placement: str, layers: int = 3) -> RunConfig:
    overrides = [*OVERRIDES, "llm.precision=fp32", f"mome.reads={reads}", f"mome.placement={placement}"]
    config = shrunk(load_config(overrides), folder)
    write_random_llama(folder, layers)
    return config


def _model(config: RunConfig) -> MoMESpeechLM:
    model = build_reference(config, WIDTHS)
    wake_reference(model, config.seed)
    model._begin(View("asr", 4, None), torch.zeros(1, 9, dtype=torch.int8))
    return model.eval()


@torch.no_grad()
def _logits(model: MoMESpeechLM, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
    return model.llm(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits


IDS = torch.arange(10, 19)[None]


@pytest.mark.parametrize("placement", ["mhsa", "ffn", "layer"])
def test_it_reads_what_the_layer_before_has(tmp_path: Path, placement: str) -> None:
    model, read = _model(_config(tmp_path, "previous", placement)), list[Tensor]()
    beside: list[Tensor] = []
    for layer, mome in zip(model.llm.model.layers, model.momes, strict=True):
        target = {"mhsa": layer.self_attn, "ffn": layer.mlp, "layer": layer}[placement]

        def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            beside.append(args[0] if args else kwargs["hidden_states"])

        target.register_forward_pre_hook(keep, with_kwargs=True)
        mome.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    _logits(model, IDS)
    for own, expected in zip(read, [beside[0], *beside[:-1]], strict=True):
        assert torch.equal(own, expected)


def test_one_layer_is_plain(tmp_path: Path) -> None:
    found = [_logits(_model(_config(tmp_path / reads, reads, "mhsa", 1)), IDS) for reads in ("own", "previous")]
    assert torch.equal(*found)
    several = [_logits(_model(_config(tmp_path / reads, reads, "mhsa")), IDS) for reads in ("own", "previous")]
    assert not torch.allclose(*several)


def test_decoding_is_what_trains(tmp_path: Path) -> None:
    model = _model(_config(tmp_path, "previous", "mhsa"))
    whole, cache = _logits(model, IDS), DynamicCache(config=model.llm.config)
    parts = [_logits(model, part, cache) for part in IDS.split([6, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_layers_of_other_ranks_are_refused(tmp_path: Path) -> None:
    config = load_config([*OVERRIDES, "mome.reads=previous"])
    check_reads(config, Layout.for_world(2, tp=2))
    with pytest.raises(UserError, match=r"mome\.reads=previous does not go with parallel\.pp=2: .* Set parallel\.pp=1"):
        check_reads(config, Layout.for_world(2, pp=2))
    with pytest.raises(UserError, match=r"parallel\.recompute=full: .* Set parallel\.recompute=selective"):
        check_reads(config, Layout.for_world(1, recompute="full"))
