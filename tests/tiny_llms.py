"""Random models of each supported architecture, small enough for seconds, as plain Hugging Face directories.

Weights are large enough that a mistake anywhere shows in the logits, and biases are not zero.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

# Neither Llama 3.1's constants nor its context: frequencies of all three kinds within a few dozen positions.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 6.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 40,
}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def llama3(**settings: Any) -> LlamaForCausalLM:
    """A Llama with the rotary scaling of Llama 3."""
    settings = {"head_dim": 16, "rope_parameters": dict(LLAMA3_ROPE), "tie_word_embeddings": False} | settings
    return _randomised(LlamaForCausalLM(LlamaConfig(**{**SIZES, **settings})))


def qwen2(**settings: Any) -> Qwen2ForCausalLM:
    """A Qwen2, whose queries, keys and values have a bias."""
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}} | settings
    return _randomised(Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **settings})))


def save(model: PreTrainedModel, directory: Path, shard_size: str = "5GB") -> Path:
    """Write a directory without a tokenizer; a small ``shard_size`` such as "20KB" gives an index and shards."""
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def edit_config(directory: Path, remove: tuple[str, ...] = (), **values: Any) -> Path:
    """Change keys of ``config.json`` in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key in remove:
        config.pop(key, None)
    path.write_text(json.dumps(config | values))
    return directory


def _randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    matrix_scale = 0.15 * math.sqrt(SIZES["hidden_size"] / model.config.hidden_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale, offset = (0.1, 1.0) if "norm" in name else (matrix_scale, 0.0)
            if name.endswith("bias"):
                scale = 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + offset)
    return model.eval()
