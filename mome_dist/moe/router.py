"""The router that all Matryoshka rates and modalities share: softmax over the routed experts, then top-K.

Shape suffixes: T tokens, E routed experts, K experts a token, H hidden size. Everything here is fp32, whatever the
precision of the LLM: a bf16 softmax over tens of experts reorders near-ties.
Source: MoME (arXiv 2510.04136), equation of the routed branch; renormalisation as in the same authors' related systems.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Attributes:
        experts_TK: int64 [T, K], the chosen experts, most probable first.
        gates_TK: fp32 [T, K], their weights; zero for tokens that are padding.
        probs_TE: fp32 [T, E], softmax over all routed experts.
        logits_TE: fp32 [T, E].
        valid_T: bool [T], False for padding; None if every token counts.
    """

    experts_TK: Tensor
    gates_TK: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    valid_T: Tensor | None

    def selected_TE(self) -> Tensor:
        """Bool [T, E]: the (token, expert) pairs that count, padding excluded."""
        selected = torch.zeros_like(self.probs_TE, dtype=torch.bool).scatter_(1, self.experts_TK, True)
        return selected if self.valid_T is None else selected & self.valid_T[:, None]

    def restricted_to(self, valid_T: Tensor) -> Routing:
        """The same routing with the tokens outside ``valid_T`` taken for padding."""
        return replace(self, gates_TK=self.gates_TK * valid_T[:, None], valid_T=valid_T)

    def gates_TE(self) -> Tensor:
        """fp32 [T, E]: the gate of every expert, zero where it was not chosen."""
        return torch.zeros_like(self.probs_TE).scatter(1, self.experts_TK, self.gates_TK)


def route(logits_TE: Tensor, top_k: int, renormalize: bool, valid_T: Tensor | None = None) -> Routing:
    """Choose the experts of each token.

    Args:
        logits_TE: fp32 [T, E].
        top_k: experts a token, at most E.
        renormalize: divide the K gates by their sum, so that they add up to one.
        valid_T: bool [T]; tokens marked False get gates of zero and appear in no count.
    """
    probs_TE = logits_TE.float().softmax(dim=-1)
    gates_TK, experts_TK = probs_TE.topk(top_k, dim=-1)
    if renormalize:
        gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
    if valid_T is not None:
        gates_TK = gates_TK * valid_T[:, None]
    return Routing(experts_TK, gates_TK, probs_TE, logits_TE, valid_T)
