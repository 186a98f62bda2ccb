"""LoRA: the closed form, the frozen start, what trains, merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mome_dist.errors import UserError
from mome_dist.speech.avhubert import AVHubertConfig, AVHubertEncoder
from mome_dist.speech.lora import attach_lora, lora_layers, merge_lora
from mome_dist.speech.whisper import WhisperAudioEncoder
from tests.whisper_directory import whisper_directory

SHAPE = AVHubertConfig(trunk_widths=(4, 8), width=32, layers=2, heads=4, ffn_width=48, dropout=0.5)
CLIP = torch.randint(0, 256, (5, 96, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def make() -> AVHubertEncoder:
    torch.manual_seed(0)
    return AVHubertEncoder(SHAPE).freeze()


def moved(encoder: nn.Module) -> None:
    """What training would change."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(encoder).values():
            layer.lora_b.normal_()


def test_start_is_the_frozen_encoder_and_only_lora_trains() -> None:
    encoder, frozen = make(), make()
    names = attach_lora(encoder, rank=4, alpha=8)
    assert names == [f"transformer.layers.{n}.attention.{p}_proj" for n in (0, 1) for p in ("v", "q")]
    assert torch.equal(encoder([CLIP])[0], frozen([CLIP])[0])
    trainable = encoder.trainable_parameters()
    assert trainable.keys() == {f"{name}.{kind}" for name in names for kind in ("lora_a", "lora_b")}
    assert sum(value.numel() for value in trainable.values()) == 4 * (4 * 32 + 32 * 4)  # layers * (A + B)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    optimizer = torch.optim.SGD(trainable.values(), lr=1.0)
    for _ in range(2):  # A moves only after B has
        encoder([CLIP])[0].square()[:, 0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trainable.keys()
    assert not any(module.training for module in encoder.modules()), "an adapted encoder stays in eval mode"


def test_closed_form() -> None:
    """x = (1, 2), W = 2x2 identity, b = (1, 1), A = (1, 1), B = (1, 3), alpha 6, rank 1: W x + b + 6 * 3 * B."""
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    attach_lora(model, rank=1, alpha=6, targets=["q_proj"])
    layer = lora_layers(model)["q_proj"]
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.fill_(1)
        layer.lora_a.copy_(torch.tensor([[1.0, 1.0]]))
        layer.lora_b.copy_(torch.tensor([[1.0], [3.0]]))
    x = torch.tensor([1.0, 2.0])
    assert layer(x).tolist() == [1 + 1 + 18, 2 + 1 + 54]
    assert layer.merged().weight.tolist() == [[1 + 6, 6], [18, 1 + 18]]
    half = layer.to(torch.bfloat16).merged()
    assert half.weight.dtype == torch.bfloat16 and half.weight.tolist() == [[7, 6], [18, 19]]


def test_peft_computes_the_same() -> None:
    ours, theirs = make(), make()
    names = attach_lora(ours, rank=4, alpha=8)
    moved(ours)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), theirs)
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            other: Any = theirs.get_submodule(name)
            other.lora_A["default"].weight.copy_(layer.lora_a)
            other.lora_B["default"].weight.copy_(layer.lora_b)
        torch.testing.assert_close(theirs([CLIP])[0], ours([CLIP])[0], rtol=1e-5, atol=1e-5)
    frozen = {f"{name}.weight" for name in names}
    assert frozen < set(ours.state_dict()) and not frozen & set(theirs.state_dict()), "PEFT renames what is frozen"


def test_merged_model_computes_the_same() -> None:
    encoder = make()
    names = set(encoder.state_dict())
    attach_lora(encoder, rank=4, alpha=8)
    moved(encoder)
    adapted = encoder([CLIP])[0]
    assert (adapted - make()([CLIP])[0]).abs().max() > 0.1
    merge_lora(encoder)
    assert set(encoder.state_dict()) == names and encoder.trainable_parameters() == {}
    torch.testing.assert_close(encoder([CLIP])[0], adapted, rtol=0, atol=1e-5)


def test_initial_values_depend_on_seed_and_name_only() -> None:
    first, second, third = make(), make(), make()
    attach_lora(first, 2, 2, seed=3)
    attach_lora(second, 2, 2, ["v_proj"], seed=3)
    attach_lora(third, 2, 2, seed=4)

    def start(model: nn.Module) -> Tensor:
        return lora_layers(model)["transformer.layers.1.attention.v_proj"].lora_a

    assert torch.equal(start(first), start(second)) and not torch.equal(start(first), start(third))


def test_any_encoder_can_be_adapted(whisper: WhisperAudioEncoder) -> None:
    names = attach_lora(whisper, rank=2, alpha=2)
    assert len(names) == 2 * len(whisper.encoder.layers)
    assert {name for name, value in whisper.named_parameters() if value.requires_grad} == {
        f"{name}.{kind}" for name in names for kind in ("lora_a", "lora_b")
    }


@pytest.fixture
def whisper(tmp_path: Path) -> WhisperAudioEncoder:
    return WhisperAudioEncoder.from_pretrained(whisper_directory(tmp_path))


def test_mistakes_are_named() -> None:
    encoder = make()
    with pytest.raises(UserError, match="rank=0"):
        attach_lora(encoder, 0, 1)
    with pytest.raises(UserError, match="'w_proj'"):
        attach_lora(encoder, 1, 1, ["q_proj", "w_proj"])
    assert encoder.trainable_parameters() == {}
    attach_lora(encoder, 1, 1)
    with pytest.raises(UserError, match="already"):
        attach_lora(encoder, 1, 1)
