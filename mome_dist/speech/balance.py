"""What keeps the experts of a projector mixture in use: a load-balance loss and a z-loss of each router.

``E * sum_e f_e P_e``, where f adds up to K over the experts, so that the loss is K at perfect balance (Llama-SMoP; in
MoME, f adds up to one), and the mean of ``logsumexp(logits)^2``. Both are means over the speech tokens that a view
reads, over all data-parallel ranks, in the mean over the views of a microbatch and over the microbatches of a step, as
the losses of MoME are: so a step in several views has the mean of the losses of each view by itself. The losses of
several routers add up, as those of layers do. A feature that a view reads as absent (modality dropout) does not count.

Shape suffixes: V views, T tokens of a router, K experts a token, H hidden size.
Source: Llama-SMoP (arXiv 2505.14336); Switch Transformer (arXiv 2101.03961); ST-MoE (arXiv 2202.08906).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from mome_dist.moe.balance import add_balance, load_balance_loss, router_z_loss
from mome_dist.moe.load import PassLoad
from mome_dist.moe.routing import Routing
from mome_dist.moe.statistics import RoutingStatistics
from mome_dist.speech.mixture import ProjectorMixture


@dataclass(frozen=True)
class SpeechRoutes:
    """What a router did in a pass.

    Attributes:
        router: its name.
        routing: of its tokens, each once, however many views read it.
        members_VN: fp32 [V, T], 1 where a view reads a token.
    """

    router: str
    routing: Routing
    members_VN: Tensor

    @cached_property
    def sizes_V2(self) -> Tensor:
        """int64 [V, 2], tokens of each view, twice: there is no padding."""
        return self.members_VN.sum(dim=1).long()[:, None].expand(-1, 2)


Balance = Callable[[Tensor, Sequence[SpeechRoutes]], Tensor]
"""Given all speech tokens of a pass, fp32 [rows, H], and what the routers did, gives the same tokens back."""


def routes_by_router(mixture: ProjectorMixture, streams: Iterable[tuple[str, Routing, Tensor]]) -> list[SpeechRoutes]:
    """The routes of each router, from the name, routing and members [V, T] of the streams that a pass reads."""
    found: dict[str, list[tuple[Routing, Tensor]]] = {}
    for stream, routing, members_VT in streams:
        found.setdefault(mixture.router_of[stream], []).append((routing, members_VT))
    return [
        SpeechRoutes(router, _joined([routing for routing, _ in parts]), torch.cat([each for _, each in parts], dim=1))
        for router, parts in found.items()
    ]


def _joined(parts: Sequence[Routing]) -> Routing:
    return Routing(
        experts_TK=torch.cat([part.experts_TK for part in parts]),
        gates_TK=torch.cat([part.gates_TK for part in parts]),
        probs_TE=torch.cat([part.probs_TE for part in parts]),
        logits_TE=torch.cat([part.logits_TE for part in parts]),
        valid_T=None,
    )


def balance_losses(mixture: ProjectorMixture, routes: Iterable[SpeechRoutes]) -> Tensor:
    """The weighted losses of a pass in one process, fp32 scalar."""
    total = next(mixture.parameters()).new_zeros(())
    for each in routes:
        for members_T in each.members_VN.bool():
            routing, tokens = each.routing.restricted_to(members_T), members_T.sum()
            balance = mixture.top_k * load_balance_loss(routing, routing.selected_TE().sum(dim=0), tokens)
            loss = mixture.balance_loss * balance + mixture.z_loss * router_z_loss(routing, tokens)
            total = total + loss / len(each.members_VN)
    return total


class ProjectorBalance:
    """Balances the routers of a rank's projectors, and counts what they did.

    As in `mome_dist.moe.balance`, the gradients of the losses join the backward pass, by which time the counts have
    been summed over the ranks, and nobody computes the losses' values.

    Args:
        mixture: whose routers they are.
        group: the data-parallel ranks. Under sequence parallelism too, every tensor-parallel rank projects all tokens.
    """

    def __init__(self, mixture: ProjectorMixture, group: dist.ProcessGroup) -> None:
        self._mixture, self._group = mixture, group
        self._statistics = {router: RoutingStatistics() for router in mixture.routers}

    def anew(self) -> ProjectorBalance:
        """One of the same routers that has counted nothing."""
        return ProjectorBalance(self._mixture, self._group)

    def of_pass(self, views: tuple[str, ...], share: float) -> Balance:
        """What `Projectors.insert` calls in a pass of training; all ranks of the group do, in the same views.

        Args:
            views: names, in order.
            share: as in `PassLoad`.
        """

        def balance(tokens_TH: Tensor, routes: Sequence[SpeechRoutes]) -> Tensor:
            mixture = self._mixture
            for each in routes:
                load = PassLoad(views, self._group, share)
                coefficient = mixture.top_k * mixture.balance_loss
                tokens_TH = add_balance(tokens_TH, each.routing, each.members_VN, load, 0, coefficient, mixture.z_loss)
                load.put(0, each, mixture.num_experts, each.routing.experts_TK)
                load.reduce()
                self._statistics[each.router].expect(load)
            return tokens_TH

        return balance

    def settle(self) -> None:
        """Add up the counts of a step, after its backward passes."""
        for statistics in self._statistics.values():
            statistics.settle()
            statistics.step_load.clear()

    def take_shares(self) -> dict[str, float]:
        """The share of each expert in the routes of its router since the last call, over the global batch, by the
        router's name and the expert's number; a router that no view read has none."""
        shares: dict[str, float] = {}
        for router, statistics in self._statistics.items():
            by_view = statistics.take()
            if by_view:
                load_E = torch.stack(list(by_view.values())).sum(dim=0)[0, : self._mixture.num_experts].tolist()
                shares |= {f"{router}.{number}": load / max(sum(load_E), 1) for number, load in enumerate(load_E)}
        return shares
