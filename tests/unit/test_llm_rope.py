"""Rotary frequencies are transformers' own, bit for bit, whatever the scaling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mome_dist.llm.rope import inverse_frequencies
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
