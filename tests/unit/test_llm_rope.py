"""Rotary frequencies are transformers' own, bit for bit, whatever the scaling; so is what a rotation makes of heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from mome_dist.llm.rope import Rotation, inverse_frequencies
from mome_dist.llm.shape import LLMShape
from tests.tiny_llms import LLAMA3_ROPE

LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0},
    "Llama 3.1": LLAMA_3_1,
    "Llama 3.2": LLAMA_3_1 | {"factor": 32.0},
    "other constants": LLAMA_3_1 | {"factor": 3.3, "low_freq_factor": 0.7, "high_freq_factor": 9.0},
    "other context": LLAMA3_ROPE,
}


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(tmp_path: Path, name: str, head_size: int) -> None:
    config = LlamaConfig(head_dim=head_size, max_position_embeddings=131072, rope_parameters=dict(SCALINGS[name]))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    shape = LLMShape.from_directory(tmp_path)
    found = inverse_frequencies(shape)
    assert torch.equal(found, LlamaRotaryEmbedding(config).inv_freq)
    plain = inverse_frequencies(replace(shape, rope_scaling=None))
    assert torch.equal(found, plain) == (name == "plain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_turned_as_by_transformers(dtype: torch.dtype) -> None:
    groups, queries, head = 2, 3, 16
    config = LlamaConfig(head_dim=head, rope_parameters=dict(LLAMA3_ROPE))
    positions_N = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0, 90, 0, 0])
    generator = torch.Generator().manual_seed(0)
    values, gradient = torch.randn(2, 12, groups, queries + 2, head, generator=generator).to(dtype)

    embedding = LlamaRotaryEmbedding(config)
    theirs = values.clone().requires_grad_()
    cos_1Nd, sin_1Nd = embedding(theirs, positions_N[None])
    query_1hNd = theirs[:, :, :-2].flatten(1, 2).transpose(0, 1)[None]
    key_1GNd = theirs[:, :, -2].transpose(0, 1)[None]
    turned = apply_rotary_pos_emb(query_1hNd, key_1GNd, cos_1Nd, sin_1Nd)
    query_NGQd, key_NG1d = (each[0].transpose(0, 1).unflatten(1, (groups, -1)) for each in turned)
    expected = torch.cat([query_NGQd, key_NG1d, theirs[:, :, -1:]], dim=2)

    mine = values.clone().requires_grad_()
    found = Rotation.of(positions_N, embedding.inv_freq, queries, dtype)(mine)
    assert found.dtype is dtype
    # Theirs rounds both products and the sum, ours one product less: where the products nearly cancel, the sum is off
    # by roundings of theirs.
    rounding = {torch.float32: 2**-24, torch.bfloat16: 2**-9}[dtype]
    relative, absolute = 2 * rounding, 2 * rounding * float(values.abs().max())
    torch.testing.assert_close(found, expected, rtol=relative, atol=absolute)
    assert torch.equal(found[:, :, -1], values[:, :, -1]), "the value is turned by nothing"
    assert torch.equal(found[0], values[0]) and not torch.equal(found[1, :, :-1], values[1, :, :-1])
    found.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=relative, atol=absolute)
    assert torch.equal(values, mine.detach()), "its input is left alone"
