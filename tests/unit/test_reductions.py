"""Methods of the family that are one another when something in them is: exact, in one process, on what their files say.

More of them, of one part each: terms of zero and tied terms in `test_llm_lora`, tied and equal projectors in
`test_projector_mixture`, the mean over drawn rates in `test_views`, and Omni-AVSR as Llama-AVSR in layouts in
`tests/parallel/test_views.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mome_dist.config import load_config
from mome_dist.model.shared import build_reference
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.views import View
from mome_dist.verification.probe import Probe, shrunk, wake_reference
from tests.unit.test_methods import METHODS

CLIPS = range(3)


def _probe(folder: Path, *settings: str) -> Probe:
    return Probe(shrunk(load_config(["experiment=tiny", "llm.precision=fp32", *settings]), folder), steps=1)


@pytest.mark.parametrize("method", METHODS)
def test_each_begins_as_the_frozen_llm(tmp_path: Path, method: str) -> None:
    """Bit for bit: what is added to its layers starts at zero."""
    probe = _probe(tmp_path, f"method={method}")
    plain = dataclasses.replace(
        probe.config,
        llm=dataclasses.replace(probe.config.llm, lora=None),
        mome=dataclasses.replace(probe.config.mome, placement="none"),
    )
    batch = probe.microbatch(CLIPS)
    with torch.no_grad():
        begun, frozen = (
            build_reference(config, probe.widths).label_logits(batch.tokens, batch.features)
            for config in (probe.config, plain)
        )
    assert torch.equal(begun, frozen)


def _trained_on(model: MoMESpeechLM, probe: Probe, views: list[View]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step in some views, and every gradient of it."""
    batch = probe.microbatch(CLIPS, views=views)
    labels = len(batch.tokens.labels.ids_L) / len(views)
    loss = model.train().loss(batch.tokens, batch.features) / (labels * len(views))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _single(pair: View) -> list[str]:
    """Llama-AVSR at a pair of rates, with the projector of Llama-MTSK: pooled, with a layer norm."""
    rates = [f"task.avsr_audio_rates=[{pair.audio_rate}]", f"task.avsr_video_rates=[{pair.video_rate}]"]
    return ["method=llama_avsr", "projector.compression=pool", "projector.layer_norm=true", *rates]


@pytest.mark.parametrize(("method", "term"), [("llama_mtsk/ms", "shared"), ("llama_mtsk/ss", "avsr_{0}_{1}")])
def test_a_step_of_llama_mtsk_is_the_mean_of_one_of_llama_avsr_at_each_pair(
    tmp_path: Path, method: str, term: str
) -> None:
    """Losses, and gradients: those of what all pairs train add up, and a pair's own are its own."""
    probe = _probe(tmp_path / "all", f"method={method}")
    model = build_reference(probe.config, probe.widths)
    wake_reference(model, seed=1)
    loss, gradients = _trained_on(model, probe, probe.views)
    held, losses = dict(model.named_parameters()), []
    expected = {name: torch.zeros_like(value) for name, value in gradients.items()}
    for pair in probe.views:
        alone = _probe(tmp_path / str(pair), *_single(pair))
        single = build_reference(alone.config, alone.widths)
        theirs = {
            name: name.replace(".shared.", f".{term.format(pair.audio_rate, pair.video_rate)}.")
            for name, _ in single.named_parameters()
        }
        single.load_state_dict({name: held[theirs[name]] for name in theirs})
        found, own = _trained_on(single, alone, [pair])
        losses.append(found)
        for name, gradient in own.items():
            expected[theirs[name]] += gradient / len(probe.views)
    assert len(losses) == 4 and len({float(each) for each in losses}) == 4
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-6, atol=0)
    assert all(gradient.any() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * float(gradient.abs().max()), msg=name)
