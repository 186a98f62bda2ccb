"""MoME with its routed experts spread over ranks.

It is a `deepspeed.moe.layer.MoE`, because the engine finds expert parameters and their process groups by that type. It
keeps DeepSpeed's experts and groups, and differs in what MoME needs:

- the router is one of `mome_dist.moe.routers`, fp32, and knows padding;
- the balance loss, and the load that moves the router's bias, are over the global batch, not per shard
  (`mome_dist.moe.balance`), and counted once a pass for all layers (`mome_dist.moe.load`);
- capacity is agreed on by all ranks, since ranks hold different numbers of tokens, and no expert's rows are padded to
  those of the busiest one (`mome_dist.moe.ragged`);
- tokens may stay where they are and weights travel instead (`mome_dist.moe.dispatch`);
- hidden states are replicated over tensor-parallel ranks and the expert-parallel group lies inside the data-parallel
  one, so each tensor-parallel rank does the same dispatch and no gather over tensor parallelism is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from mome_dist.moe.balance import add_balance, add_batch_loss
from mome_dist.moe.dispatch.alltoall import AllToAllDispatch
from mome_dist.moe.dispatch.base import Gate
from mome_dist.moe.dispatch.gather import GatherDispatch
from mome_dist.moe.experts import CommonParts, ExpertStack, initial_part
from mome_dist.moe.forms.registry import DEFAULT
from mome_dist.moe.load import PassLoad, StackLoad
from mome_dist.moe.routed import RoutedExperts
from mome_dist.moe.routers.base import Router
from mome_dist.moe.routers.build import build_router
from mome_dist.moe.routers.spec import PLAIN, RouterSpec
from mome_dist.moe.routing import Passes, Routed, Routing
from mome_dist.moe.widths import Widths
from mome_dist.token_context import FixedTokens, TokenContext


class ExpertParallelMoME(MoE):
    """A MoME module whose routed experts are spread over ``ep_size`` ranks; the shared ones are replicated.

    Args:
        hidden_size, routed_experts, top_k, shared_experts, bottleneck, router, expert, widths: as in `LocalMoME`.
        ep_size: expert-parallel ranks; divides ``routed_experts`` and the data-parallel size.
        dispatch: "alltoall" (tokens travel), "gather" (weights travel) or "local" (one expert-parallel rank, nothing
            travels).
        capacity_factor, eval_capacity_factor, min_capacity, drop_policy: see `AllToAllDispatch`.
        balance_loss, z_loss: coefficients of the auxiliary losses.

    Attributes:
        place: among the modules of its stage.
        balance_weights: fp32 [E], of the experts in the balance loss; None where they count alike.
    """

    balance_weights: Tensor | None

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
        *,
        ep_size: int = 1,
        dispatch: str = "alltoall",
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 4,
        drop_policy: str = "probs",
        balance_loss: float = 0.01,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(
            hidden_size,
            nn.Identity(),  # our own experts take the place of what DeepSpeed makes of it
            num_experts=routed_experts,
            ep_size=ep_size,
            k=top_k,
            # Expert groups inside the data-parallel group, one per tensor-parallel rank and pipeline stage.
            enable_expert_tensor_parallelism=True,
        )
        gate = Gate(build_router(router, hidden_size, routed_experts, top_k))
        experts = RoutedExperts(self.num_local_experts, hidden_size, bottleneck, self.expert_group_name, expert)
        if dispatch == "alltoall":
            self.deepspeed_moe = AllToAllDispatch(
                self, gate, experts, capacity_factor, eval_capacity_factor, min_capacity, drop_policy
            )
        else:
            assert dispatch == "gather" or ep_size == 1, "local dispatch has every expert on every rank"
            self.deepspeed_moe = GatherDispatch(self, gate, experts)
        self.router.read_experts(experts)
        of_shared = None if widths is None else [widths.shared] * shared_experts
        # DeepSpeed's checkpoint code takes any parameter with "expert" in its name for a routed one.
        self.shared = (
            ExpertStack(shared_experts, hidden_size, bottleneck, expert, of_shared) if shared_experts else None
        )
        self.common = CommonParts(hidden_size, bottleneck, expert)  # on every rank; the last in an engine's order
        self.balance_loss, self.z_loss = balance_loss, z_loss
        self._unit_counts = (bottleneck,) * routed_experts if widths is None else widths.routed
        weights = None if widths is None else widths.balance_weights
        weights_E = None if weights is None else torch.tensor(weights)
        self.register_buffer("balance_weights", weights_E, persistent=False)
        self.place = 0

    @property
    def ep_rank(self) -> int:
        """This rank's place in its expert-parallel group: it holds experts ``ep_rank * num_local_experts`` and on."""
        return dist.get_rank(self.deepspeed_moe.ep_group) if self.ep_size > 1 else 0

    def set_token_group(self, group: dist.ProcessGroup | None) -> None:
        """Tell which ranks hold different tokens: the capacity is agreed on over them."""
        self.deepspeed_moe.token_group = group

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        """As `LocalMoME.initialize`, for the experts that this rank holds. Needs the expert-parallel group."""
        self.router.initialize(prefix, seed)
        first = self.ep_rank * self.num_local_experts
        experts = self.deepspeed_moe.experts
        for expert, part, start, shape in experts.parts():
            width, name = self._unit_counts[first + expert], f"{prefix}.routed.{first + expert}.{part.name}"
            value = initial_part(name, part, shape, seed, width).flatten()
            experts.packed.view(-1)[start : start + value.numel()] = value
        if self.shared is not None:
            self.shared.initialize(f"{prefix}.shared", seed)
        self.common.initialize(f"{prefix}.common", seed)

    def forward(
        self, hidden: Tensor, tokens: TokenContext | FixedTokens, load: PassLoad | StackLoad | None = None
    ) -> Tensor:
        """[..., H] -> [..., H] in the same dtype; dead tokens get the shared experts only.

        Args:
            tokens: of the hidden states, as many as these have rows.
            load: where to count; None counts nothing, and adds no auxiliary loss.
        """
        passes: list[tuple[Routed, Tensor | None]] = []
        output_TH = self.router.in_turn(
            hidden.reshape(-1, hidden.shape[-1]), lambda x_TH: self._landed(self._start(x_TH, tokens), passes)
        )
        return self._balanced(output_TH, passes, tokens, load).view(hidden.shape)

    def begin(
        self, hidden: Tensor, tokens: TokenContext | FixedTokens, load: PassLoad | StackLoad | None = None
    ) -> Callable[[], Tensor]:
        """Start what travels of these hidden states, if it can start before what else is to be computed of them. What
        is returned gives the output of `forward`, and is called once."""
        if not self.deepspeed_moe.tokens_travel or self.router.passes > 1:
            return partial(self, hidden, tokens, load)
        landing = self._start(hidden.reshape(-1, hidden.shape[-1]), tokens)

        def finish() -> Tensor:
            passes: list[tuple[Routed, Tensor | None]] = []
            return self._balanced(self._landed(landing, passes), passes, tokens, load).view(hidden.shape)

        return finish

    def _start(self, hidden_TH: Tensor, tokens: TokenContext | FixedTokens) -> Callable[[], Tensor]:
        """A pass through the experts, of which the dispatch begins what it can."""
        return self.deepspeed_moe.begin(hidden_TH, self.common.enter(hidden_TH), tokens, self.shared)

    def _landed(self, landing: Callable[[], Tensor], passes: list[tuple[Routed, Tensor | None]]) -> Tensor:
        """What a pass adds, [T, H]; its routes, and which of them were kept, are appended."""
        added_TH = self.common.leave(landing())
        dispatch = self.deepspeed_moe
        assert dispatch.routing is not None
        passes.append((dispatch.routing, dispatch.kept()))
        return added_TH

    def _balanced(
        self,
        output_TH: Tensor,
        passes: Sequence[tuple[Routed, Tensor | None]],
        tokens: TokenContext | FixedTokens,
        load: PassLoad | StackLoad | None,
    ) -> Tensor:
        """The output, counted, whose backward pass adds the gradients of the auxiliary losses."""
        if load is None:
            return output_TH
        routes, kept = zip(*passes, strict=True)
        routing, kept_TK = (routes[0], kept[0]) if len(routes) == 1 else (Passes(routes), _joined(kept))
        values_TS = cast(Routing, routing).values_TS if self.router.has_batch_loss else None
        sums_VS = None if values_TS is None else tokens.members_VN @ values_TS
        if load.counting:
            load.put(self.place, tokens, self.num_experts, routing.experts_TK, kept_TK, routing.chosen_TK, sums_VS)
        own = self.router.losses(cast(Routing, routing)) if self.router.has_losses else ()
        if torch.is_grad_enabled() and (self.balance_loss or self.z_loss or own):
            losses = self.balance_loss, self.z_loss, own, self.balance_weights
            output_TH = add_balance(output_TH, routing, tokens.members_VN, load, self.place, *losses)
        if sums_VS is not None and torch.is_grad_enabled():
            assert isinstance(load, PassLoad), "captured layers have no loss of the whole batch"
            output_TH = add_batch_loss(output_TH, sums_VS, load, self.place, self.router.batch_loss)
        return output_TH

    @property
    def router(self) -> Router:
        """Equal on all ranks."""
        return self.deepspeed_moe.router

    def prefetch(self, dtype: torch.dtype) -> None:
        """Start what the dispatch can do before the hidden states (of this dtype) are there."""
        self.deepspeed_moe.prefetch(dtype)


def _joined(kept: Sequence[Tensor | None]) -> Tensor | None:
    """Of several passes, which routes were kept, beside one another; None if none can be dropped."""
    found = [each for each in kept if each is not None]
    return torch.cat(found, dim=1) if found else None
