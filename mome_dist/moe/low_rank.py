"""Routed low-rank experts of the LLM's query and value projections (placement "qv"), on a tensor-parallel rank.

``q += s (sum_routed g_e(h) B_e A_e h + sum_shared B_e A_e h)``, and alike for values, with factors of their own and the
same gates: one router reads what the attention reads, once a layer. It is a LoRA (`mome_dist.adapters`) whose terms are
weighted by a router and not by the view of a token; all experts are one product each way, and each rank has the rows of
B that belong to its heads. One expert is a LoRA of rank b, and equal gates of all N are one of rank N b, scaled by
s / N.

Source: LoRAMoE (arXiv 2312.09979), MoLoRA (arXiv 2309.05444) and MixLoRA (arXiv 2404.15159) are mixtures of LoRA; which
projections have one differs between them. Queries and values are this project's choice, as those of the LoRA that it
stands beside (Llama-AVSR, arXiv 2409.12319); so are one router for both, and shared experts, which are MoME's.
`mome_dist.moe.local_low_rank` is the one-process form.

Shape suffixes: N tokens, E routed experts, S shared ones, X both (routed first), b rank of an expert, H hidden size, Z
the rank's queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mome_dist.adapters.tensor_parallel import narrowed, widened
from mome_dist.moe.auxiliary import Auxiliary, counted
from mome_dist.moe.load import PassLoad, StackLoad
from mome_dist.moe.local_low_rank import initial_factors, weights_of
from mome_dist.moe.routers.build import build_router
from mome_dist.moe.routers.parts import router_parts
from mome_dist.moe.routers.spec import PLAIN, RouterSpec
from mome_dist.packed_module import PackedModule, PackedTensor, saved_under
from mome_dist.parallel.parts import NamedPart
from mome_dist.sharing import Sharing
from mome_dist.token_context import FixedTokens, TokenContext


class LowRankExperts(PackedModule):
    """The experts of one layer, and their router.

    Args:
        layer: of the LLM, from zero.
        hidden_size: H.
        query_width, value_width: of all ranks' projections together.
        routed_experts, top_k, shared_experts, bottleneck, router: Nr, K, Ns and b of MoME, as in
            `mome_dist.moe.local.LocalMoME`.
        scale: s.
        ranks: tensor-parallel ones.
        sequence_parallel: whether a rank has a part of the tokens between products.
        balance_loss, z_loss: coefficients of the auxiliary losses.

    Attributes:
        a: fp32, A of the queries' experts, routed ones first, then of the values', one after another.
        b: fp32, the rank's rows of B, alike.
        router: equal on all ranks; in a state dict, its tensors are called ``router_NAME``.
        num_experts: Nr.
        place: among the modules of its stage.
    """

    def __init__(
        self,
        layer: int,
        hidden_size: int,
        query_width: int,
        value_width: int,
        routed_experts: int,
        top_k: int,
        shared_experts: int,
        bottleneck: int,
        router: RouterSpec = PLAIN,
        scale: float = 1.0,
        *,
        ranks: int = 1,
        sequence_parallel: bool = False,
        balance_loss: float = 0.01,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer, self.hidden_size, self.bottleneck, self.scale = layer, hidden_size, bottleneck, scale
        self.num_experts, self.shared_experts = routed_experts, shared_experts
        self.widths = {"q": query_width // ranks, "v": value_width // ranks}
        self.sequence_parallel, self.balance_loss, self.z_loss = sequence_parallel, balance_loss, z_loss
        each = (routed_experts + shared_experts) * bottleneck
        self.a = nn.Parameter(torch.empty(2 * each * hidden_size))
        self.b = nn.Parameter(torch.empty(each * sum(self.widths.values())))
        self.router = build_router(router, hidden_size, routed_experts, top_k)
        saved_under(self, "router.", "router_")
        self.router.read_experts(self)
        self.place = 0

    def first_part(self) -> Tensor:
        """As in `mome_dist.moe.routers.base.ReadableExperts`: A of the queries."""
        shape = self.num_experts, self.bottleneck, self.hidden_size
        return self.a[: math.prod(shape)].view(shape)

    def tensors(self) -> Iterator[PackedTensor]:
        """The factors, [experts, ...] each."""
        for factor, parameter in (("a", self.a), ("b", self.b)):
            start = 0
            for projection, width in self.widths.items():
                one = (self.bottleneck, self.hidden_size) if factor == "a" else (width, self.bottleneck)
                for kind, experts in (("routed", self.num_experts), ("shared", self.shared_experts)):
                    if experts:
                        yield PackedTensor(f"{projection}.{kind}.{factor}", parameter, start, (experts, *one))
                    start += experts * math.prod(one)

    def named_parts(self, prefix: str) -> Iterator[NamedPart]:
        """Its tensors (`mome_dist.parallel.parts.Described`)."""
        for name, parameter, start, shape in self.tensors():
            # A's gradient is that of a rank's own tokens; B's rows are the rank's own.
            sliced, partial = (None, True) if parameter is self.a else (1, False)
            sharing = Sharing(self.layer, sliced=sliced, partial=partial, packed=f"{prefix}.{name[-1]}")
            yield NamedPart(f"{prefix}.{name}", None, parameter, start, shape, sharing)
        yield from router_parts(prefix, self.layer, self.router)

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        """As `mome_dist.moe.local_low_rank.LocalLowRank.initialize`, for the rows that this rank holds."""
        self.router.initialize(prefix, seed)
        for part in self.named_parts(prefix):
            if part.parameter is self.a or part.parameter is self.b:
                part.value.copy_(part.here(initial_factors(part.name, part.whole_shape, seed)))

    def forward(
        self,
        hidden_N1H: Tensor,
        qkv_N1Z: Tensor,
        groups: int,
        tokens: TokenContext | FixedTokens,
        load: PassLoad | StackLoad | None = None,
    ) -> Tensor:
        """Add the experts to a rank's queries and values; dead tokens get the shared ones only.

        Args:
            hidden_N1H, qkv_N1Z, groups: as of `mome_dist.adapters.tensor_parallel.TensorParallelLoRA`.
            tokens: of ``hidden_N1H``.
            load: where to count; None counts nothing, and adds no auxiliary loss.

        Returns:
            ``qkv_N1Z``.
        """
        routing = self.router(hidden_N1H[:, 0], tokens)
        weights_NX = weights_of(routing.gates_TE(), self.shared_experts, self.scale, hidden_N1H.dtype)
        low_N1R = narrowed(hidden_N1H, self.a, weights_NX, self.bottleneck)
        if load is not None:
            settings = Auxiliary(self.place, self.balance_loss, self.z_loss)
            low_N1R = counted(low_N1R, routing, None, tokens, load, self.router, settings)
        widths = list(self.widths.values())
        return widened(qkv_N1Z, low_N1R, self.b, widths, self.bottleneck, groups, self.sequence_parallel)
