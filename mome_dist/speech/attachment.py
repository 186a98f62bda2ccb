"""Experts of a layer of Hugging Face's model, and the hooks that add what they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mome_dist.moe.local import LocalMoME, LocalRouted
from mome_dist.moe.local_low_rank import LocalLowRank
from mome_dist.moe.unrouted import LocalUnrouted
from mome_dist.token_context import OneView

Tokens = Callable[[Tensor], OneView]
"""Says what hidden states [B, S, H] are of."""


def attached_experts(
    layer: Any, placement: str, hidden_size: int, tokens: Tokens, arguments: dict[str, Any]
) -> LocalRouted | LocalUnrouted:
    """Make the experts of a layer, with a router where there is something to choose, and attach them.

    Args:
        layer: a decoder layer of transformers; those of Llama and Qwen2 name their parts alike.
        placement: "mhsa", "ffn", "layer" or "qv".
        arguments: of `LocalMoME`, or with "qv" of `LocalLowRank`.
    """
    if placement == "qv":
        return LocalLowRank(layer.self_attn, tokens, **arguments)
    beside = _experts(hidden_size, **arguments)
    attach(layer, placement, beside, tokens)
    return beside


def _experts(hidden_size: int, **arguments: Any) -> LocalMoME | LocalUnrouted:
    if arguments["routed_experts"]:
        return LocalMoME(hidden_size, **arguments)
    kept = ("shared_experts", "bottleneck", "expert")
    return LocalUnrouted(hidden_size, **{name: arguments[name] for name in kept if name in arguments})


def attach(layer: Any, placement: str, mome: LocalMoME | LocalUnrouted, tokens: Tokens) -> None:
    """Add ``mome(h)`` to a sub-layer's output, where h is what the sub-layer reads, through a forward hook."""
    targets: dict[str, nn.Module] = {"mhsa": layer.self_attn, "ffn": layer.mlp, "layer": layer}

    def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        if mome.device != first.device:
            mome.to(
                first.device
            )  # the layers of an LLM that was spread over devices say where each MoME module belongs
        hidden = hidden.to(first.device)
        added = mome(hidden, first, tokens(first)) if isinstance(mome, LocalMoME) else mome(hidden, first)
        return (added, *output[1:]) if isinstance(output, tuple) else added

    targets[placement].register_forward_hook(add, with_kwargs=True)
