"""All experts of a layer and their router, laid out once for any number of passes that need no gradient.

In evaluation weights stand still: casting and joining them for every token would take longer than the products do.

Shape suffixes: T tokens, H hidden size, E routed experts, K of them a token, R rows of the router's maps, X all experts
(routed first), U units of an expert with one more for its output bias, N = X U.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.fused_bottleneck import ExpertWeights

# GELU(x) = x to the last bit of every float type from here on, and a power of two divides without rounding.
BIAS_INPUT = 8.0
FEW_TOKENS = 64  # up to here, one product for router and experts is faster than two

Choice = tuple[Tensor, Tensor]  # experts_TK, gates_TK
# From the products with the router's maps, fp32 [T, R]; None where it has none.
Choose = Callable[[Tensor | None], Choice]


class PackedExperts:
    """Experts for inference, in the precision of the hidden states; the router stays in fp32.

    An output bias is one more unit: nothing but `BIAS_INPUT` goes in, and GELU lets it pass. So a gate weights all of
    an expert with one product.

    Args:
        maps_RH: of the router, fp32 (`mome_dist.moe.routers.base.Router.maps`); None if it has none.
        stacks: `ExpertWeights` of routed experts, and of shared ones if there are any, all of as many units.
        dtype: of the hidden states.
    """

    def __init__(self, maps_RH: Tensor | None, stacks: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> None:
        joined = ExpertWeights(*(torch.cat([part.detach() for part in parts]) for parts in zip(*stacks, strict=True)))
        experts, bottleneck, hidden_size = joined.down_weight.shape
        self.routed, self.units = len(stacks[0][0]), bottleneck + 1
        down_XUH = F.pad(joined.down_weight, (0, 0, 0, 1))
        down_bias_XU = F.pad(joined.down_bias, (0, 1), value=BIAS_INPUT)
        up_XUH = torch.cat([joined.up_weight.transpose(1, 2), joined.up_bias.unsqueeze(1) / BIAS_INPUT], dim=1)
        self._maps_RH = None if maps_RH is None else maps_RH.detach().float()
        self._both: Tensor | None = None  # router and experts; their products have one precision in fp32 alone
        if dtype == torch.float32 and self._maps_RH is not None:
            rows = len(self._maps_RH)
            self._both = torch.cat([self._maps_RH, down_XUH.flatten(0, 1)])
            self._both_bias = F.pad(down_bias_XU.flatten(), (rows, 0))
            self._maps_RH, down_NH = self._both.split([rows, experts * self.units])
            down_bias_N = self._both_bias[rows:]
        else:
            self._maps_RH = None if self._maps_RH is None else self._maps_RH.clone()
            down_NH, down_bias_N = down_XUH.flatten(0, 1).to(dtype), down_bias_XU.flatten().to(dtype)
        self._down_NH, self._down_bias_N = down_NH, down_bias_N
        self._up_NH = up_XUH.flatten(0, 1).to(dtype)
        device = joined.down_weight.device
        if device.type == "cpu":
            # For one token, expert by expert; input biases are further rows behind the weights.
            bias_rows = -(-self.units // hidden_size)
            bias_XR = F.pad(down_bias_XU, (0, bias_rows * hidden_size - self.units))
            self._down_XR = torch.cat([down_XUH.flatten(1), bias_XR], dim=1).to(dtype)
            self._up_XR = self._up_NH.view(experts, self.units * hidden_size)
        self._is_shared_1X = (torch.arange(experts, device=device) >= self.routed).float()[None]
        self._shared_1S = torch.arange(self.routed, experts, device=device)[None]
        self._ones_1S = torch.ones(1, experts - self.routed, device=device)

    def added_to(self, base_TH: Tensor, hidden_TH: Tensor, choose: Choose) -> Tensor:
        """``base + MoME(hidden)``: [T, H].

        One token on a CPU takes the time that weights take from memory: only those of its experts are read. More tokens
        go through all experts, and the gates are a mask; for bottlenecks of a few units, sorting tokens by expert takes
        longer than it saves, up to a thousand tokens.
        """
        one = len(hidden_TH) == 1 and hidden_TH.device.type == "cpu"
        return (self._one_token if one else self._all)(base_TH, hidden_TH, choose)

    def _products(self, hidden_TH: Tensor) -> Tensor | None:
        return None if self._maps_RH is None else F.linear(hidden_TH.float(), self._maps_RH)

    def _all(self, base_TH: Tensor, hidden_TH: Tensor, choose: Choose) -> Tensor:
        if self._both is not None and len(hidden_TH) <= FEW_TOKENS:
            both = F.linear(hidden_TH, self._both, self._both_bias)
            rows = both.shape[1] - len(self._down_NH)
            products_TR: Tensor | None = both[:, :rows]
            narrow_TN = both[:, rows:]
        else:
            products_TR, narrow_TN = self._products(hidden_TH), F.linear(hidden_TH, self._down_NH, self._down_bias_N)
        experts_TK, gates_TK = choose(products_TR)
        tokens = len(hidden_TH)
        gates_TX = self._is_shared_1X.expand(tokens, -1).scatter_add(1, experts_TK, gates_TK)
        inputs_TXU = F.gelu(narrow_TN).view(tokens, -1, self.units).mul_(gates_TX.unsqueeze(2))
        return torch.addmm(base_TH, inputs_TXU.view(tokens, -1), self._up_NH)

    def _one_token(self, base_1H: Tensor, hidden_1H: Tensor, choose: Choose) -> Tensor:
        experts_1K, gates_1K = choose(self._products(hidden_1H))
        experts = torch.cat([experts_1K, self._shared_1S], dim=1).view(-1)
        gates_1X = torch.cat([gates_1K, self._ones_1S], dim=1)
        width = hidden_1H.shape[1]
        down_XR = self._down_XR.index_select(0, experts)
        narrow_XU = torch.mv(down_XR.view(-1, width), hidden_1H[0]).view(len(experts), -1)[:, : self.units]
        weights = self.units * width
        narrow_XU.add_(down_XR[:, weights : weights + self.units])
        # These numbers do not lie side by side: those that do, PyTorch hands to oneDNN, whose GELU takes longer to
        # start than all of this.
        inputs_XU = F.gelu(narrow_XU).mul_(gates_1X.t())
        return torch.addmm(base_1H, inputs_XU.view(1, -1), self._up_XR.index_select(0, experts).view(-1, width))
