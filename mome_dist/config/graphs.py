"""What CUDA graphs of the LLM's layers (``llm.graphs``) do not go with."""

from __future__ import annotations

from typing import Any

from mome_dist.config.schema import RunConfig
from mome_dist.errors import UserError


def filled_tokens(config: RunConfig) -> int:
    """Tokens that every microbatch of training is filled up to with dead ones; 0 if they stay as they are."""
    return 0 if config.llm.graphs == "none" else config.data.microbatch_tokens or 0


def check_graphs(config: RunConfig) -> None:
    """Refuse graphs of layers that are not whole on a rank, or in which the host decides by values.

    Raises:
        UserError: naming the key.
    """
    if config.llm.graphs == "none":
        return
    key, parallel, mome = f"llm.graphs={config.llm.graphs}", config.parallel, config.mome
    whole = "a graph holds whole layers, without collectives"
    asked: dict[str, tuple[Any, Any, str]] = {
        "parallel.tp": (parallel.tp, 1, whole),
        "parallel.pp": (parallel.pp, 1, "a graph's memory holds one microbatch at a time, and pipeline stages several"),
        "parallel.ep": (parallel.ep, 1, whole),
        "parallel.recompute": (parallel.recompute, "none", "a graph keeps what its backward pass needs"),
        "llm.lora": (config.llm.lora, None, "which terms a token has is found out on the host"),
        "llm.sink_loss": (config.llm.sink_loss, 0, "which tokens it is of is found out on the host"),
    }
    if mome.placed:
        asked["mome.reads"] = (mome.reads, "own", "layers are captured without what others read")
    if mome.experts:
        name = str(mome.router["name"])
        asked["mome.router.name"] = (name, "top_k", "which router a token has is found out on the host")
        asked["mome.dispatch"] = (mome.dispatch, "local", "the host waits for the rows of other dispatches")
    for other, (value, needed, why) in asked.items():
        if value != needed:
            fix = f"{other}={'null' if needed is None else needed}"
            raise UserError(f"{key} does not go with {other}={value}: {why}. Set {fix}, or llm.graphs=none.")
    if config.data.microbatch_tokens is None:
        raise UserError(
            f"{key} needs data.microbatch_tokens, the number of tokens that every microbatch is filled up to: set it, "
            "or llm.graphs=none."
        )
