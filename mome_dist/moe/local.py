"""MoME in one process: every expert is here, nothing travels, nothing is dropped.

This is the form used to decode, to export, and to prove the parallel forms against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.moe.experts import ExpertStack, dense_experts, initial_value
from mome_dist.moe.router import Routing, route


class LocalMoME(nn.Module):
    """``MoME(h) = sum_shared E_n(h) + sum_routed g_n(h) E_n(h)`` for hidden states of any leading shape.

    Args:
        hidden_size, routed_experts, top_k, shared_experts, bottleneck: H, Nr, K, Ns, b of the paper.
        renormalize: whether the K gates are divided by their sum.
        score: "softmax" or "sigmoid", see `mome_dist.moe.router.route`.
        bias_rate: above 0, the choice of experts has a bias; here it only comes from a checkpoint.

    Attributes:
        router_bias: fp32 [Nr], or None.
        observer: called with the `Routing` of every forward pass if set; used for activation statistics.
        last_routing: routing of the latest forward pass, for losses; None before the first.
    """

    router_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        routed_experts: int,
        top_k: int,
        shared_experts: int,
        bottleneck: int,
        renormalize: bool = True,
        score: str = "softmax",
        bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.top_k, self.renormalize, self.score = top_k, renormalize, score
        self.router_weight = nn.Parameter(torch.empty(routed_experts, hidden_size))
        self.register_buffer("router_bias", torch.zeros(routed_experts) if bias_rate > 0 else None)
        self.routed = ExpertStack(routed_experts, hidden_size, bottleneck)
        self.shared = ExpertStack(shared_experts, hidden_size, bottleneck) if shared_experts else None
        self.observer: Callable[[Routing], None] | None = None
        self.last_routing: Routing | None = None

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        """Set the initial values that every parallel layout starts from; ``prefix`` is the module's global name."""
        self.router_weight.copy_(initial_value(f"{prefix}.router_weight", tuple(self.router_weight.shape), seed))
        for kind, stack in (("routed", self.routed), ("shared", self.shared)):
            for name, parameter in stack.named_parameters() if stack is not None else ():
                for expert, value in enumerate(parameter):
                    value.copy_(initial_value(f"{prefix}.{kind}.{expert}.{name}", tuple(value.shape), seed))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] in any float dtype -> [..., H] in the same dtype; arithmetic is fp32."""
        hidden_TH = hidden.reshape(-1, hidden.shape[-1]).float()
        logits_TE = F.linear(hidden_TH, self.router_weight)
        self.last_routing = routing = route(
            logits_TE, self.top_k, self.renormalize, score=self.score, bias_E=self.router_bias
        )
        if self.observer is not None:
            self.observer(routing)
        output_TH = dense_experts(hidden_TH, self.routed.weights(), routing.gates_TE(), self.shared)
        return output_TH.to(hidden.dtype).view(hidden.shape)
