"""The dimensions of a Llama-like model, read from a Hugging Face ``config.json`` without loading anything.

Two architectures are read: Llama (2, 3.x, SmolLM2) and Qwen2 (2, 2.5), which is Llama with a bias on queries, keys and
values. Whatever else a ``config.json`` may switch on is refused by name: a model that loads here computes what Hugging
Face computes. No torch here: launchers read shapes before they start anything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError, no_file
from mome_dist.origins import origin_of

# Architecture: (model_type that goes with it, whether queries, keys and values have a bias).
ARCHITECTURES = {"LlamaForCausalLM": ("llama", False), "Qwen2ForCausalLM": ("qwen2", True)}


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch slow rotary frequencies to longer contexts (see `mome_dist.llm.rope`).

    Attributes:
        factor: by which the slowest frequencies are divided.
        low_freq_factor: turns over the original context below which a frequency is divided by the whole factor.
        high_freq_factor: turns over the original context above which a frequency is left alone.
        original_max_positions: tokens of the original context.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class LLMShape:
    """Dimensions of a decoder-only model of the Llama family (names as in transformers' ``LlamaConfig``).

    Attributes:
        architecture: transformers' class.
        qkv_bias: whether queries, keys and values have a bias.
        rope_scaling: None for plain rotary positions.
        tied_embeddings: the output layer uses the token embeddings, unless the files hold an output layer of its own.
    """

    architecture: str
    vocabulary: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    qkv_bias: bool
    norm_epsilon: float
    rope_base: float
    rope_scaling: RopeScaling | None
    max_positions: int
    tied_embeddings: bool

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrix products of one layer."""
        attention = 2 * self.hidden_size * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden_size * self.ffn_size

    @property
    def attention_share(self) -> float:
        """What looking at one more token costs a token, in products of its own with a layer's weights."""
        return self.heads * self.head_size / self.layer_parameters

    def with_padded_heads(self, tp: int) -> LLMShape:
        """The shape with whole key-value groups added until ``tp`` divides them.

        The added heads have zero weights and biases, read and write nothing, and leave the model's function as it is;
        they cost their share of the attention's arithmetic.
        """
        groups = -(-self.kv_heads // tp) * tp
        return replace(self, heads=groups * (self.heads // self.kv_heads), kv_heads=groups)

    @classmethod
    def from_directory(cls, directory: str | Path) -> LLMShape:
        """Read ``config.json`` of a plain Hugging Face directory; `mome_dist.llm.directory` checks the weights too.

        Raises:
            UserError: if the directory or file is missing, names another architecture, lacks a key, or uses a feature
                that is not supported.
        """
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise UserError(f"llm.path={str(directory)!r}: {path} {no_file(path)}; {origin_of('llm', directory)}.")
        config = _Config(path)
        architecture = config.architecture()
        config.refuse_unsupported()
        heads, hidden_size = config.count("num_attention_heads"), config.count("hidden_size")
        kv_heads = config.count("num_key_value_heads", heads)
        head_size = config.count("head_dim", hidden_size // heads)
        if heads % kv_heads:
            raise config.error(f"has num_attention_heads={heads}, not a multiple of num_key_value_heads={kv_heads}")
        if head_size % 2:
            raise config.error(f"gives heads of {head_size} channels; rotary positions need an even number")
        base, scaling = config.rope()
        return cls(
            architecture=architecture,
            vocabulary=config.count("vocab_size"),
            hidden_size=hidden_size,
            ffn_size=config.count("intermediate_size"),
            layers=config.count("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            qkv_bias=ARCHITECTURES[architecture][1],
            norm_epsilon=config.positive("rms_norm_eps"),
            rope_base=base,
            rope_scaling=scaling,
            max_positions=config.count("max_position_embeddings"),
            tied_embeddings=bool(config.get("tie_word_embeddings")),
        )


def unreadable(path: Path, error: Exception) -> UserError:
    """What to tell of a file of ``llm.path`` that cannot be read, or not as what it should be."""
    fix = "give this user the right to read it" if isinstance(error, PermissionError) else "fetch it again"
    return UserError(f"llm.path: {path} cannot be read ({getattr(error, 'strerror', None) or error}); {fix}.")


class _Config:
    """A parsed ``config.json`` that says what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error
        if not isinstance(self.values, dict):
            raise self.error("holds no JSON object; fetch it again")

    def error(self, problem: str) -> UserError:
        return UserError(f"llm.path: {self.path} {problem}.")

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def architecture(self) -> str:
        """The one supported architecture that the file names."""
        named = self.get("architectures")
        known = [name for name in named or [] if name in ARCHITECTURES]
        if len(known) != 1:
            raise self.error(f"names architectures={named}; supported: {', '.join(ARCHITECTURES)}")
        model_type = ARCHITECTURES[known[0]][0]
        if self.get("model_type") not in (None, model_type):
            raise self.error(
                f"names architectures={named} but model_type={self.get('model_type')!r}; it must be {model_type!r}"
            )
        return known[0]

    def refuse_unsupported(self) -> None:
        """Refuse features that change what the model computes and are not implemented."""
        for key in ("attention_bias", "mlp_bias"):
            if self.get(key):
                raise self.error(f"sets {key}=true, which is not supported; use a model without it")
        if self.get("hidden_act") not in (None, "silu"):
            raise self.error(f"sets hidden_act={self.get('hidden_act')!r}; supported: 'silu'")
        if self.get("quantization_config"):
            raise self.error("sets quantization_config; give the directory of the model in bf16, fp16 or fp32")
        layer_types = self.get("layer_types")
        if layer_types:
            slides = any(kind != "full_attention" for kind in layer_types)
        else:
            # transformers' defaults: a window of 4096 tokens, from the 29th layer on.
            window = self.values.get("sliding_window", 4096) if self.get("use_sliding_window") else None
            first = self.values.get("max_window_layers", 28)
            slides = window is not None and first < self.count("num_hidden_layers")
        if slides:
            raise self.error(
                "uses sliding-window attention, which is not supported; if no sequence of yours is longer than its "
                "window, set use_sliding_window=false and remove layer_types there"
            )

    def positive(self, key: str, default: float | None = None, section: dict[str, Any] | None = None) -> float:
        """A number above zero; the default stands for a missing key or null."""
        values = self.values if section is None else section
        value = values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(f"has no {key!r}; fetch it again")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.error(f"has {key}={value!r}; it must be a number above 0")
        return float(value)

    def count(self, key: str, default: int | None = None, section: dict[str, Any] | None = None) -> int:
        """A whole number above zero."""
        value = self.positive(key, default, section)
        if value != int(value):
            raise self.error(f"has {key}={value}; it must be a whole number")
        return int(value)

    def rope(self) -> tuple[float, RopeScaling | None]:
        """Base and scaling, from either spelling that transformers has written (the older one wins, as there)."""
        settings = self.get("rope_scaling") or self.get("rope_parameters") or {}
        if not isinstance(settings, dict):
            raise self.error(f"has RoPE settings {settings!r}; they must be a JSON object")
        base = self.positive("rope_theta", self.positive("rope_theta", 10000.0), settings)
        partial = settings.get("partial_rotary_factor") or self.get("partial_rotary_factor") or 1.0
        if partial != 1.0:
            raise self.error(f"sets partial_rotary_factor={partial}; supported: 1.0")
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind == "default":
            return base, None
        if kind != "llama3":
            raise self.error(f"uses RoPE scaling of rope_type={kind!r}; supported: 'default', 'llama3'")
        original = self.count("original_max_position_embeddings", self.count("max_position_embeddings"), settings)
        scaling = RopeScaling(
            factor=self.positive("factor", section=settings),
            low_freq_factor=self.positive("low_freq_factor", section=settings),
            high_freq_factor=self.positive("high_freq_factor", section=settings),
            original_max_positions=self.count("original_max_position_embeddings", original),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise self.error(
                f"has low_freq_factor={scaling.low_freq_factor}, which is not below high_freq_factor="
                f"{scaling.high_freq_factor}"
            )
        return base, scaling
