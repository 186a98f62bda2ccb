"""MoME in one process: every expert is here, nothing travels, nothing is dropped.

This is the form used to decode, to export, and to prove the parallel forms against. In eval mode and without gradients
its weights are laid out once (`mome_dist.moe.packed`), and again as soon as any of them has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from mome_dist.moe.experts import CommonParts, ExpertStack
from mome_dist.moe.forms.registry import DEFAULT
from mome_dist.moe.plain_pack import Pack
from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.build import build_router
from mome_dist.moe.routers.spec import PLAIN, RouterSpec
from mome_dist.moe.routing import Routing, joined
from mome_dist.moe.widths import Widths
from mome_dist.packed_module import saved_under

Made = TypeVar("Made")


class Kept(Generic[Made]):
    """What was made from tensors, such as packed experts, which values of which of them it was made from, and for what
    else.

    A tensor's version counter rises with every write in place (autograd itself relies on it), and its address is its
    own as long as something holds its memory, as this object does. Tensors of inference mode count nothing: what is
    made from them is never used again.
    """

    def __init__(self, made: Made, sources: list[Tensor], purpose: Hashable) -> None:
        self.made, self._purpose = made, purpose
        self._held = [tensor.detach() for tensor in sources]
        self._stamps = _stamps(sources)

    def is_of(self, sources: list[Tensor], purpose: Hashable) -> bool:
        """Whether packing again would give the same."""
        return purpose == self._purpose and self._stamps is not None and self._stamps == _stamps(sources)


def _stamps(tensors: list[Tensor]) -> list[tuple[int, int]] | None:
    try:
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
    except RuntimeError:  # inference mode
        return None


class LocalMoME(nn.Module):
    """``MoME(h) = sum_shared E_n(h) + sum_routed g_n(h) E_n(h)`` for hidden states of any leading shape.

    Args:
        hidden_size, routed_experts, top_k, shared_experts, bottleneck: H, Nr, K, Ns, b of the paper.
        router: what chooses experts; its state, such as a bias, here only comes from a checkpoint.
        expert: name of the experts' form (`mome_dist.moe.forms.registry`).
        widths: units of each expert where they differ; ``bottleneck`` is that of the widest then.

    Attributes:
        router: in a state dict, its tensors are called ``router_NAME``.
        observer: called with the `Routing` of every pass through the experts if set; used for activation statistics.
        last_routing: routing of the latest forward pass, for losses, of a chain as that of more tokens; None before the
            first, and after one without gradients in eval mode.
    """

    def __init__(
        self,
        hidden_size: int,
        routed_experts: int,
        top_k: int,
        shared_experts: int,
        bottleneck: int,
        router: RouterSpec = PLAIN,
        expert: str = DEFAULT,
        widths: Widths | None = None,
    ) -> None:
        super().__init__()
        self.widths = widths
        routed, shared = (None, None) if widths is None else (widths.routed, [widths.shared] * shared_experts)
        self.router = build_router(router, hidden_size, routed_experts, top_k)
        saved_under(self, "router.", "router_")
        self.routed = ExpertStack(routed_experts, hidden_size, bottleneck, expert, routed)
        self.router.read_experts(self.routed)
        self.common = CommonParts(hidden_size, bottleneck, expert)
        self.shared = ExpertStack(shared_experts, hidden_size, bottleneck, expert, shared) if shared_experts else None
        self.observer: Callable[[Routing], None] | None = None
        self.last_routing: Routing | None = None
        self._pack: Kept[Pack] | None = None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.routed.weights()[0].device

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        """Set the initial values that every parallel layout starts from; ``prefix`` is the module's global name."""
        self.router.initialize(prefix, seed)
        self.routed.initialize(f"{prefix}.routed", seed)
        self.common.initialize(f"{prefix}.common", seed)
        if self.shared is not None:
            self.shared.initialize(f"{prefix}.shared", seed)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; frees the packed weights, in either mode."""
        self._pack = None
        return super().train(mode)

    def forward(self, hidden: Tensor, base: Tensor | None = None, tokens: RoutedTokens | None = None) -> Tensor:
        """MoME of hidden states, added to ``base`` if that is given.

        Args:
            hidden: [..., H] in any float dtype.
            base: of the same shape and dtype.
            tokens: as many as ``hidden`` has rows; None for routers that ask nothing of them.

        Returns:
            The same shape and dtype. Arithmetic is fp32 where gradients are wanted or the module is in train mode;
            else the experts compute in the dtype of ``hidden`` and the router in fp32.
        """
        hidden_TH, router = hidden.reshape(-1, hidden.shape[-1]), self.router
        if not (self.training or torch.is_grad_enabled()):
            base_TH = torch.zeros_like(hidden_TH) if base is None else base.reshape(hidden_TH.shape)
            if self.last_routing is not None:
                self.last_routing = None
            if router.passes == 1:
                return self._evaluated(base_TH, hidden_TH, tokens).view(hidden.shape)
            added_TH = router.in_turn(hidden_TH, lambda x_TH: self._evaluated(torch.zeros_like(x_TH), x_TH, tokens))
            return (base_TH + added_TH).view(hidden.shape)
        routings: list[Routing] = []
        output_TH = router.in_turn(hidden_TH.float(), lambda x_TH: self._trained(x_TH, tokens, routings))
        self.last_routing = joined(routings)
        output = output_TH.to(hidden.dtype).view(hidden.shape)
        return output if base is None else base + output

    def _evaluated(self, base_TH: Tensor, hidden_TH: Tensor, tokens: RoutedTokens | None) -> Tensor:
        """One pass, added to ``base_TH``, with the weights laid out."""
        packed = self._packed(hidden_TH.dtype, tokens)

        def choose(products_TR: Tensor | None) -> tuple[Tensor, Tensor]:
            return self._choose(hidden_TH, products_TR, tokens)

        return packed.added_to(base_TH, hidden_TH, choose)

    def _trained(self, hidden_TH: Tensor, tokens: RoutedTokens | None, routings: list[Routing]) -> Tensor:
        """One pass in fp32, whose routing is appended."""
        routing = self.router(hidden_TH, tokens)
        routings.append(routing)
        if self.observer is not None:
            self.observer(routing)
        shared = None if self.shared is None else self.shared.weights()
        inside_TD = self.common.enter(hidden_TH)
        return self.common.leave(self.routed.form.dense(inside_TD, self.routed.weights(), routing.gates_TE(), shared))

    def _choose(
        self, hidden_TH: Tensor, products_TR: Tensor | None, tokens: RoutedTokens | None
    ) -> tuple[Tensor, Tensor]:
        router = self.router
        logits_TE = router.logits(hidden_TH, tokens) if products_TR is None else router.logits_of(products_TR, tokens)
        if self.observer is None:
            return router.choose(logits_TE, tokens)
        routing = router.route(logits_TE, tokens)
        self.observer(routing)
        return routing.experts_TK, routing.gates_TK

    def _packed(self, dtype: torch.dtype, tokens: RoutedTokens | None) -> Pack:
        """The weights as they are now. Their tensors come from the dictionaries of the modules: this runs once for
        every layer and token."""
        if torch.compiler.is_compiling() and self._pack is not None:
            return self._pack.made  # of the pass before, over the prefix, which is never compiled
        sources: list[Any] = []
        for part in self._modules.values():
            sources += part._parameters.values() if part is not None else ()
        purpose = dtype, self.router.used(tokens)
        if self._pack is None or not self._pack.is_of(sources, purpose):
            stacks = [self.routed.weights()] + ([self.shared.weights()] if self.shared is not None else [])
            common = self.common.weights()
            self._pack = Kept(
                self.routed.form.packed(self.router.maps(tokens), stacks, dtype, common), sources, purpose
            )
        return self._pack.made
