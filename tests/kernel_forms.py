"""A MoME layer by the Triton kernels and in PyTorch's form, on the same inputs, with every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.balance import add_balance
from mome_dist.moe.columns import unpack
from mome_dist.moe.experts import ExpertStack
from mome_dist.moe.forms.registry import find_form
from mome_dist.moe.fused_bottleneck import dense_experts
from mome_dist.moe.load import PassLoad
from mome_dist.moe.routing import route
from mome_dist.moe.triton.experts import LayerForm, kernel_experts
from mome_dist.token_context import TokenContext

BALANCE, Z_LOSS, SHARE = 0.3, 0.07, 0.4

# The largest relative error of a result in bf16, which has 8 significant bits: half the distance of neighbours where it
# is rounded, all of it in Triton's interpreter, which cuts the rest off.
ROUNDED, CUT = 2.0**-8, 2.0**-7
# Of a sum of products, in the norm: a rounding has an error of R / sqrt(3) in the mean square, and the way from the
# inputs to a result has at most nine, those of both forms together (narrow, its bias, GELU, gate, product, result; the
# gradients likewise). Independent, they are sqrt(9) times one; the slope of GELU is at most 1.13: less than 2 R.
IN_THE_NORM = 2.0


@dataclass(frozen=True)
class Layer:
    """A layer and its tokens.

    Attributes:
        views: tokens of each.
        dead: tokens at the end.
        biased: whether the choice has a bias; it keeps the second expert from every token.
    """

    routed: int = 6
    units: int = 3
    top_k: int = 2
    shared: int = 1
    views: tuple[int, ...] = (5, 9)
    dead: int = 3
    score: str = "softmax"
    renormalize: bool = True
    biased: bool = False
    dtype: torch.dtype = torch.float32
    hidden: int = 16

    @property
    def form(self) -> LayerForm:
        """What the kernels are compiled for."""
        return LayerForm(self.routed, self.shared, self.units, self.top_k, self.score == "sigmoid", self.renormalize)

    @property
    def context(self) -> TokenContext:
        """The context of the tokens, on the CPU."""
        views = [(f"view {number}", [tokens]) for number, tokens in enumerate(self.views)]
        return TokenContext.of(views, multiple=1, least=sum(self.views) + self.dead)

    def random(self, *shape: int, seed: int) -> Tensor:
        """Return normal numbers in fp32."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def choice_bias(self) -> Tensor | None:
        """Return the bias of the choice, fp32 [E], or None."""
        if not self.biased:
            return None
        bias_E = 0.2 * self.random(self.routed, seed=7)
        bias_E[min(1, self.routed - 1)] = -100
        return bias_E


def computed(layer: Layer, device: torch.device | str, by_kernel: bool) -> dict[str, Tensor]:
    """Output, choice, counts and every gradient of a pass of training, on the CPU in fp32."""
    context = layer.context.to(torch.device(device))
    shapes = find_form("bottleneck").shapes(layer.hidden, layer.units)
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    scale = layer.hidden**-0.5

    def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return layer.random(*shape, seed=seed).to(device, dtype).requires_grad_()

    hidden_TH = leaf(context.tokens, layer.hidden, seed=1, dtype=layer.dtype)
    router_EH, packed_EP = leaf(layer.routed, layer.hidden, seed=2), leaf(layer.routed, numbers, seed=3)
    shared = ExpertStack(layer.shared, layer.hidden, layer.units).to(device) if layer.shared else None
    with torch.no_grad():
        for number, part in enumerate(shared.parameters() if shared is not None else ()):
            part.copy_(layer.random(*part.shape, seed=10 + number))
    bias_E = layer.choice_bias()
    settings: dict[str, Any] = {
        "top_k": layer.top_k,
        "renormalize": layer.renormalize,
        "score": layer.score,
        "bias_E": None if bias_E is None else bias_E.to(device),
    }
    logits_TE = F.linear(hidden_TH.float(), scale * router_EH)
    weights_EP = scale * packed_EP
    load = PassLoad(context.view_names, None, SHARE)
    routed: Any
    if by_kernel:
        output_TH, routed = kernel_experts(hidden_TH, logits_TE, weights_EP, shapes, shared, context, **settings)
    else:
        routed = route(logits_TE, valid_T=context.alive_N, **settings)
        weights = unpack(weights_EP, shapes, weights_EP.dtype)
        output_TH = dense_experts(hidden_TH, weights, routed.gates_TE(), None if shared is None else shared.weights())
    load.put(0, context, layer.routed, routed.experts_TK)
    output_TH = add_balance(output_TH, routed, context.members_VN, load, 0, BALANCE, Z_LOSS)
    load.reduce()
    inputs = {"hidden": hidden_TH, "logits": logits_TE, "router": router_EH, "packed": packed_EP}
    inputs |= {f"shared {name}": part for name, part in shared.named_parameters()} if shared is not None else {}
    weight_TH = layer.random(*output_TH.shape, seed=4).to(device, layer.dtype)
    gradients = torch.autograd.grad(output_TH, list(inputs.values()), weight_TH)
    found = {"output": output_TH, "experts": routed.experts_TK, "counts": load.of(0)}
    found["sums"] = routed.balance_sums(context.members_VN, True)
    found |= dict(zip(inputs, gradients, strict=True))
    assert output_TH.dtype is layer.dtype and output_TH.shape == hidden_TH.shape
    assert all(gradient.dtype is each.dtype for gradient, each in zip(gradients, inputs.values(), strict=True))
    return {name: value.detach().cpu() for name, value in found.items()}


def errors(layer: Layer, device: torch.device | str) -> dict[str, float]:
    """Relative errors (in the norm, of which dead or unused parts are zero) of the kernels against PyTorch's form;
    what is a whole number must be equal."""
    ours, theirs = (computed(layer, device, by_kernel) for by_kernel in (True, False))
    assert ours.keys() == theirs.keys()
    for name in ("experts", "counts"):
        assert ours[name].equal(theirs[name]), (layer, name)
    return {
        name: float((ours[name] - value).double().norm() / value.double().norm().clamp(min=1e-30))
        for name, value in theirs.items()
        if value.is_floating_point()
    }
