"""Shapes of well-known LLMs, for plans without their files."""

from __future__ import annotations

from pathlib import Path

from mome_dist.errors import UserError
from mome_dist.llm.shape import LLMShape


def _llama(
    layers: int,
    hidden_size: int,
    ffn_size: int,
    heads: int,
    kv_heads: int = 8,
    vocabulary: int = 128256,
    head_size: int = 128,
    tied: bool = False,
    qwen: bool = False,
) -> LLMShape:
    return LLMShape(
        architecture="Qwen2ForCausalLM" if qwen else "LlamaForCausalLM",
        vocabulary=vocabulary,
        hidden_size=hidden_size,
        ffn_size=ffn_size,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        qkv_bias=qwen,
        norm_epsilon=1e-5,
        rope_base=500_000.0,
        rope_scaling=None,
        max_positions=131_072,
        tied_embeddings=tied,
    )


# As their config.json files say; what matters to a plan are the sizes.
LLMS = {
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, head_size=64, tied=True),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, tied=True),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32),
    "llama-3.1-70b": _llama(80, 8192, 28672, 64),
    "llama-3.1-405b": _llama(126, 16384, 53248, 128),
    "llama-2-7b": _llama(32, 4096, 11008, 32, kv_heads=32, vocabulary=32000),
    "qwen2.5-0.5b": _llama(24, 896, 4864, 14, kv_heads=2, vocabulary=151936, head_size=64, tied=True, qwen=True),
    "qwen2.5-7b": _llama(28, 3584, 18944, 28, kv_heads=4, vocabulary=152064, qwen=True),
    "smollm2-135m": _llama(30, 576, 1536, 9, kv_heads=3, vocabulary=49152, head_size=64, tied=True),
}


def find_shape(given: str) -> LLMShape:
    """The shape of a model in `LLMS`, or of a Hugging Face directory.

    Raises:
        UserError: if it is neither.
    """
    known = LLMS.get(given.lower())
    if known is not None:
        return known
    if not Path(given).is_dir():
        raise UserError(
            f"the LLM {given!r} is neither a directory with a config.json nor one of {', '.join(LLMS)}: "
            "name one with --llm."
        )
    return LLMShape.from_directory(given)
