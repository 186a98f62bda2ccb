"""Whether a layout can divide an LLM."""

from __future__ import annotations

from mome_dist.errors import UserError
from mome_dist.llm.shape import LLMShape
from mome_dist.parallel.layout import Layout, divisors


def check_division(shape: LLMShape, layout: Layout, routed_experts: int, pad_heads: bool) -> None:
    """Check that a layout can divide a model.

    Args:
        shape: of the LLM.
        routed_experts: of each MoME module; 0 in a run without experts.
        pad_heads: whether attention heads may be padded to a multiple of tp.

    Raises:
        UserError: naming the parallel key, the model's number, and sizes that would work.
    """
    tp = layout.tp
    for what, value in (("vocabulary entries", shape.vocabulary), ("feed-forward units", shape.ffn_size)):
        if value % tp:
            raise UserError(f"parallel.tp={tp} does not divide the LLM's {value} {what}: {_tp_choices(shape)}")
    if shape.kv_heads % tp and not pad_heads:
        padded = shape.with_padded_heads(tp)
        raise UserError(
            f"parallel.tp={tp} does not divide the LLM's {shape.heads} attention heads in {shape.kv_heads} "
            f"key-value groups: {_tp_choices(shape)}, or set llm.pad_heads=true to compute with "
            f"{padded.heads} heads, the added ones zero."
        )
    layout.check_division(shape.layers, routed_experts)


def _tp_choices(shape: LLMShape) -> str:
    sizes = (shape.kv_heads, shape.vocabulary, shape.ffn_size)
    return f"choose tp from {[d for d in divisors(shape.kv_heads) if all(size % d == 0 for size in sizes)]}"
