"""Faults of public code for this family that concern model and optimiser: each check passes here and fails where the
fault is.

4: what trains is kept in bf16 alone, so that small updates are rounded away. 9: a misplaced parenthesis that drops the
LayerNorm of the projectors. 10: padding that is trained as end of text, because no pad token was defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mome_dist.config.schema import OptimizerConfig
from mome_dist.engine.engine import Engine
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.speech.projector import Projectors
from mome_dist.speech.sequence import Example, PackedTokens, pack
from mome_dist.speech.views import View
from mome_dist.training.step import forward_backward
from mome_dist.verification.probe import write_random_llama
from tests.parallel import toy
from tests.parallel.worlds import run_world

RATE = 1e-4  # of the optimiser: far below the distance of two bf16 numbers near 0.5, which is 2e-3


def _one_step(directory: Path, zero: int, planted: bool) -> dict[str, Any]:
    """Train one step with the LLM in bf16; return what the check looks at."""
    layout, settings = Layout.for_world(1), OptimizerConfig(weight_decay=0.0)
    with parallel_world(layout, toy.SEED, timeout_seconds=60):
        model = toy.distributed(directory, "mhsa", layout, precision=torch.bfloat16)
        engine = Engine(model, settings, {"zero_optimization": {"stage": zero}})
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
        before = [norm.weight.detach().clone() for norm in norms]
        with engine.accumulate():
            forward_backward(model, toy.step_of([0, 1, 2, 3], 0, 1))
        engine.step(RATE)
        if planted:
            with torch.no_grad():
                for parameter in engine.parameters():  # what it would be if it had been stored in bf16
                    parameter.copy_(parameter.bfloat16())
        frozen = next(p for p in model.parts()[0].llm.parameters() if not p.requires_grad)
        return {
            "frozen": frozen.dtype,
            "trained": {parameter.dtype for parameter in engine.parameters()},
            "moments": {value.dtype for name in engine.moment_names for _, value in engine.moments.whole(name)},
            "moved": torch.cat([(norm.weight - old).abs() for norm, old in zip(norms, before, strict=True)]).tolist(),
        }


def _assert_full_precision(found: dict[str, Any]) -> None:
    assert found["frozen"] == torch.bfloat16
    assert found["trained"] == found["moments"] == {torch.float32}
    # Adam's first update of a weight is the learning rate, whatever its gradient (but for epsilon).
    assert sum(abs(moved - RATE) < 0.01 * RATE for moved in found["moved"]) > 0.95 * len(found["moved"])


@pytest.mark.parametrize("zero", [0, 1])
def test_fault_04_what_trains_is_kept_in_fp32_beside_a_bf16_llm(tmp_path: Path, zero: int) -> None:
    llama = write_random_llama(tmp_path / "llama")
    clean, planted = (run_world(_one_step, 1, llama, zero, each)[0] for each in (False, True))
    _assert_full_precision(clean)
    with pytest.raises(AssertionError):
        _assert_full_precision(planted)


def _assert_normalised(projectors: Projectors) -> None:
    """Whatever the size of the features, speech tokens enter the LLM at the size of its embeddings."""
    generator = torch.Generator().manual_seed(0)
    for stream, width in toy.WIDTHS.items():
        clip = torch.randn(20, width, generator=generator)
        for scale in (1.0, 100.0):
            tokens = projectors(stream, [scale * clip], 2)
            torch.testing.assert_close(tokens.mean(dim=1), torch.zeros(len(tokens)), rtol=0, atol=1e-5)
            sizes = tokens.square().mean(dim=1).sqrt()
            # Below its scale by the norm's epsilon of 1e-5 beside a variance of 1e-2 at the least.
            torch.testing.assert_close(sizes, torch.full_like(sizes, toy.EMBEDDING_SCALE), rtol=1e-3, atol=0)


def test_fault_09_projectors_end_in_a_layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    _assert_normalised(toy.projectors())
    made = Projectors.__init__

    def without_norm(self: Projectors, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        for module in list(self.modules()):
            if isinstance(module, nn.Sequential):
                del module[-1]

    monkeypatch.setattr(Projectors, "__init__", without_norm)
    with pytest.raises(AssertionError):
        _assert_normalised(toy.projectors())


VIEW, END = View("avsr", 4, 5), 2  # the id of the end of text in `toy.example`
CLIPS = list(range(6))  # of different lengths


def _loss(model: nn.Module, numbers: list[int]) -> Tensor:
    batch = toy.microbatch(numbers, [VIEW])
    loss: Tensor = model.loss(batch.tokens, batch.features)  # type: ignore[operator]
    return loss


def _assert_padding_is_not_trained(model: nn.Module) -> None:
    tokens = toy.microbatch(CLIPS, [VIEW]).tokens
    alive_N = tokens.context.alive_N
    assert alive_N is not None and not alive_N.all() and alive_N[tokens.labels.index_L].all()
    assert int((tokens.labels.ids_L == END).sum()) == len(CLIPS), "the end of text is a label once in every sequence"
    assert not (tokens.ids_N == END).any(), "and never an input"
    # Batching changes nothing: the loss of a batch is the sum of the losses of its clips.
    alone = sum((_loss(model, [number]) for number in CLIPS), torch.zeros(()))
    torch.testing.assert_close(_loss(model, CLIPS), alone, rtol=1e-5, atol=0)


def _pad_with_end_of_text(sequences: Sequence[tuple[View, Sequence[Example]]], multiple: int) -> PackedTokens:
    """Plant: a pad token that is the end of text up to the longest sequence, and labels wherever it stands."""
    padded = []
    for view, examples in sequences:
        longest = max(len(each.ids) for each in examples)
        filled = [Example(each.ids + [END] * (longest - len(each.ids)), each.prefix_length) for each in examples]
        padded.append((view, filled))
    return pack(padded, multiple=multiple)


def test_fault_10_padding_is_not_trained_as_end_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy.reference(write_random_llama(tmp_path), "mhsa").eval()
    _assert_padding_is_not_trained(model)
    monkeypatch.setattr(toy, "pack", _pad_with_end_of_text)
    with pytest.raises(AssertionError):
        _assert_padding_is_not_trained(model)
