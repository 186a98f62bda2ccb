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

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from mome_dist.moe.auxiliary import Auxiliary, counted
from mome_dist.moe.dispatch.alltoall import AllToAllDispatch
from mome_dist.moe.dispatch.base import Gate
from mome_dist.moe.dispatch.gather import GatherDispatch
from mome_dist.moe.experts import ExpertStack, initial_value
from mome_dist.moe.forms.registry import DEFAULT
from mome_dist.moe.load import PassLoad, StackLoad
from mome_dist.moe.routed import RoutedExperts
from mome_dist.moe.routers.base import Router
from mome_dist.moe.routers.build import build_router
from mome_dist.moe.routers.spec import PLAIN, RouterSpec
from mome_dist.token_context import FixedTokens, TokenContext


class ExpertParallelMoME(MoE):
    """A MoME module whose routed experts are spread over ``ep_size`` ranks; the shared ones are replicated.

    Args:
        hidden_size, routed_experts, top_k, shared_experts, bottleneck, router, expert: as in `LocalMoME`.
        ep_size: expert-parallel ranks; divides ``routed_experts`` and the data-parallel size.
        dispatch: "alltoall" (tokens travel), "gather" (weights travel) or "local" (one expert-parallel rank, nothing
            travels).
        capacity_factor, eval_capacity_factor, min_capacity, drop_policy, reroute_candidates, alltoall_nodes: see
            `AllToAllDispatch`.
        balance_loss, z_loss: coefficients of the auxiliary losses.
        keep_probs: keep the probabilities of all tokens for terms that need them, which one fused kernel does not.

    Attributes:
        place: among the modules of its stage.
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
        *,
        ep_size: int = 1,
        dispatch: str = "alltoall",
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 4,
        drop_policy: str = "probs",
        reroute_candidates: int | None = None,
        alltoall_nodes: int = 1,
        balance_loss: float = 0.01,
        z_loss: float = 0.0,
        keep_probs: bool = False,
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
            dropped = capacity_factor, eval_capacity_factor, min_capacity, drop_policy, reroute_candidates
            self.deepspeed_moe = AllToAllDispatch(self, gate, experts, *dropped, alltoall_nodes)
        else:
            assert dispatch == "gather" or ep_size == 1, "local dispatch has every expert on every rank"
            self.deepspeed_moe = GatherDispatch(self, gate, experts, keep_probs)
        self.router.read_experts(experts)
        # DeepSpeed's checkpoint code takes any parameter with "expert" in its name for a routed one.
        self.shared = ExpertStack(shared_experts, hidden_size, bottleneck, expert) if shared_experts else None
        self.balance_loss, self.z_loss = balance_loss, z_loss
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
            value = initial_value(f"{prefix}.routed.{first + expert}.{part.name}", shape, seed, part.start).flatten()
            experts.packed.view(-1)[start : start + value.numel()] = value
        if self.shared is not None:
            self.shared.initialize(f"{prefix}.shared", seed)

    def forward(
        self, hidden: Tensor, tokens: TokenContext | FixedTokens, load: PassLoad | StackLoad | None = None
    ) -> Tensor:
        """[..., H] -> [..., H] in the same dtype; dead tokens get the shared experts only.

        Args:
            tokens: of the hidden states, as many as these have rows.
            load: where to count; None counts nothing, and adds no auxiliary loss.
        """
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        dispatch = self.deepspeed_moe
        output_TH = dispatch(hidden_TH, tokens, self.shared)
        if load is not None:
            assert dispatch.routing is not None
            settings = Auxiliary(self.place, self.balance_loss, self.z_loss)
            output_TH = counted(output_TH, dispatch.routing, dispatch.kept(), tokens, load, self.router, settings)
        return output_TH.view(hidden.shape)

    @property
    def router(self) -> Router:
        """Equal on all ranks."""
        return self.deepspeed_moe.router

    def prefetch(self, dtype: torch.dtype) -> None:
        """Start what the dispatch can do before the hidden states (of this dtype) are there."""
        self.deepspeed_moe.prefetch(dtype)
