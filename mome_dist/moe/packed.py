"""All experts of a layer and their router, laid out once for any number of passes that need no gradient.

In evaluation weights stand still: casting and joining them for every token would take longer than the products do.

Shape suffixes: T tokens, H hidden size, E routed experts, K of them a token, X all experts (routed first), U units of an
expert with one more for its output bias, N = X U.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.experts import ExpertWeights

# GELU(x) = x to the last bit of every float type from here on, and a power of two divides without rounding.
BIAS_INPUT = 8.0
ROWS_AN_EXPERT = 16  # from here on, a CPU is faster with one product an expert than with the products of all tokens

Choice = tuple[Tensor, Tensor]  # experts_TK, gates_TK
Choose = Callable[[Tensor], Choice]  # from logits, fp32 [T, E]


class PackedExperts:
    """Experts for inference, in the precision of the hidden states; the router stays in fp32.

    An output bias is one more unit: nothing but `BIAS_INPUT` goes in, and GELU lets it pass. So a gate weights all of an
    expert with one product.

    Args:
        router_weight: fp32 [E, H].
        stacks: routed experts, and shared ones if there are any, all of as many units.
        dtype: of the hidden states.
    """

    def __init__(self, router_weight: Tensor, stacks: Sequence[ExpertWeights], dtype: torch.dtype) -> None:
        joined = ExpertWeights(*(torch.cat([part.detach() for part in parts]) for parts in zip(*stacks, strict=True)))
        experts, bottleneck, hidden_size = joined.down_weight.shape
        self.routed, self.units, self._dtype = len(router_weight), bottleneck + 1, dtype
        down_XUH = F.pad(joined.down_weight, (0, 0, 0, 1))
        down_bias_XU = F.pad(joined.down_bias, (0, 1), value=BIAS_INPUT)
        up_XUH = torch.cat([joined.up_weight.transpose(1, 2), joined.up_bias.unsqueeze(1) / BIAS_INPUT], dim=1)
        router_EH = router_weight.detach().float()
        if dtype == torch.float32:  # one product for both
            self._both = torch.cat([router_EH, down_XUH.flatten(0, 1)])
            self._both_bias = F.pad(down_bias_XU.flatten(), (self.routed, 0))
            self._router_EH, down_NH = self._both.split([self.routed, experts * self.units])
            down_bias_N = self._both_bias[self.routed :]
        else:
            self._router_EH, down_NH = router_EH.clone(), down_XUH.flatten(0, 1).to(dtype)
            down_bias_N = down_bias_XU.flatten().to(dtype)
        self._down_NH, self._down_bias_N = down_NH, down_bias_N
        self._up_NH = up_XUH.flatten(0, 1).to(dtype)
        # The same memory, expert by expert.
        self._down_XR, self._up_XR = (part.view(experts, self.units * hidden_size) for part in (down_NH, self._up_NH))
        self._down_bias_XU = down_bias_N.view(experts, self.units)
        device = router_weight.device
        self._is_shared_1X = (torch.arange(experts, device=device) >= self.routed).float()[None]
        self._shared = torch.arange(self.routed, experts, device=device)
        self._ones = torch.ones(experts - self.routed, device=device)

    def added_to(self, base_TH: Tensor, hidden_TH: Tensor, top_k: int, choose: Choose) -> Tensor:
        """``base + MoME(hidden)``: [T, H].

        Three ways to the same sums. On a CPU the weights' way from memory is the time of one token, so only those of
        its experts are read; of many tokens, products are, and each goes through its own experts alone. In between,
        and wherever asking for the number of rows would wait for the device, all tokens go through all experts, and
        the gates are a mask.
        """
        if hidden_TH.device.type == "cpu":
            if len(hidden_TH) == 1:
                return self._one_token(base_TH, hidden_TH, choose)
            if len(hidden_TH) * top_k >= ROWS_AN_EXPERT * self.routed:
                return self._by_expert(base_TH, hidden_TH, choose)
        return self._all(base_TH, hidden_TH, choose)

    def _logits(self, hidden_TH: Tensor) -> Tensor:
        return F.linear(hidden_TH.float(), self._router_EH)

    def _all(self, base_TH: Tensor, hidden_TH: Tensor, choose: Choose) -> Tensor:
        if self._dtype == torch.float32:
            both = F.linear(hidden_TH, self._both, self._both_bias)
            logits_TE, narrow_TN = both[:, : self.routed], both[:, self.routed :]
        else:
            logits_TE, narrow_TN = self._logits(hidden_TH), F.linear(hidden_TH, self._down_NH, self._down_bias_N)
        experts_TK, gates_TK = choose(logits_TE)
        tokens = len(hidden_TH)
        gates_TX = self._is_shared_1X.expand(tokens, -1).scatter(1, experts_TK, gates_TK)
        inputs_TXU = F.gelu(narrow_TN).view(tokens, -1, self.units).mul_(gates_TX.unsqueeze(2))
        return torch.addmm(base_TH, inputs_TXU.view(tokens, -1), self._up_NH)

    def _one_token(self, base_1H: Tensor, hidden_1H: Tensor, choose: Choose) -> Tensor:
        experts_1K, gates_1K = choose(self._logits(hidden_1H))
        experts = torch.cat([experts_1K[0], self._shared])
        gates = torch.cat([gates_1K[0], self._ones])
        width = hidden_1H.shape[1]
        narrow = torch.addmv(
            self._down_bias_XU.index_select(0, experts).view(-1),
            self._down_XR.index_select(0, experts).view(-1, width),
            hidden_1H[0],
        )
        inputs = F.gelu(narrow).view(-1, self.units).mul_(gates.unsqueeze(1))
        return torch.addmm(base_1H, inputs.view(1, -1), self._up_XR.index_select(0, experts).view(-1, width))

    def _by_expert(self, base_TH: Tensor, hidden_TH: Tensor, choose: Choose) -> Tensor:
        experts_TK, gates_TK = choose(self._logits(hidden_TH))
        tokens, top_k = experts_TK.shape
        order = experts_TK.flatten().argsort()
        rows_RH = hidden_TH.index_select(0, order // top_k)
        found_RH = torch.empty_like(rows_RH)
        ends = torch.bincount(experts_TK.flatten(), minlength=self.routed).cumsum(0).tolist()
        for expert, (start, end) in enumerate(pairwise([0, *ends])):
            if start < end:
                own = slice(expert * self.units, (expert + 1) * self.units)
                bias_U1 = self._down_bias_N[own].unsqueeze(1)
                # Units by tokens: a product with few rows is faster than one with few columns.
                active_UT = F.gelu(torch.addmm(bias_U1, self._down_NH[own], rows_RH[start:end].t()))
                torch.mm(active_UT.t(), self._up_NH[own], out=found_RH[start:end])
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        added_TH = F.embedding_bag(
            place.view(tokens, top_k), found_RH, per_sample_weights=gates_TK.to(self._dtype), mode="sum"
        )
        if len(self._shared):
            start = self.routed * self.units
            active = F.gelu(F.linear(hidden_TH, self._down_NH[start:], self._down_bias_N[start:]))
            base_TH = torch.addmm(base_TH, active, self._up_NH[start:])
        return added_TH.add_(base_TH)
