"""What keeps the routed experts in use: the Switch load-balance loss, the router z-loss, and a bias without a loss.

The losses are means over the tokens of the global batch, not of one shard: with ``global_counts`` and ``global_tokens``
summed over the data-parallel ranks, the sum over ranks of what `load_balance_loss` returns equals the loss of the whole
batch in one process, and so do its gradients. The count of tokens per expert carries no gradient: it is a factor of the
others. So in training nobody waits for it in the forward pass, and nobody computes the losses' values: their gradients
join the backward pass (`add_balance`), by which time the counts of all layers have been summed in one collective.

The bias of an expert is added to its score for the choice of experts only. After every optimiser step it moves by a
fixed amount, up for experts below the mean load of the global batch and down for those above, so no gradient pulls
the router away from its task.
Source: Switch Transformer (arXiv 2101.03961) equations 4-6; ST-MoE (arXiv 2202.08906) equation 5 for the z-loss;
Wang et al. (arXiv 2408.15664) algorithm 1 for the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mome_dist.moe.load import BalanceSettings, PassLoad, StackLoad
from mome_dist.moe.routing import Routed, Routing


def _masked_sum(values_T: Tensor, valid_T: Tensor | None) -> Tensor:
    """Sum over valid tokens of a per-token quantity [T] or [T, E]."""
    if valid_T is None:
        return values_T.sum(dim=0)
    mask = valid_T if values_T.dim() == 1 else valid_T[:, None]
    return (values_T * mask).sum(dim=0)


def load_balance_loss(
    routing: Routing, global_counts_E: Tensor, global_tokens: Tensor, weights_E: Tensor | None = None
) -> Tensor:
    """This rank's part of ``E * sum_e f_e P_e``; 1.0 over all ranks when perfectly balanced.

    Sigmoid scores count as probabilities after normalisation over all experts (DeepSeek-V3, equations 17-20).

    Args:
        routing: this rank's tokens.
        global_counts_E: [E], tokens of all ranks that chose each expert, before any drop.
        global_tokens: scalar, valid tokens of all ranks.
        weights_E: fp32 [E], of the experts' terms (`mome_dist.moe.widths`); None for ones.
    """
    num_experts, top_k = routing.probs_TE.shape[1], routing.experts_TK.shape[1]
    tokens = global_tokens.clamp(min=1).float()
    routes = top_k * tokens if routing.chosen_TK is None else global_counts_E.sum().clamp(min=1).float()
    fraction_E = global_counts_E.float() / routes
    probability_E = _masked_sum(routing.probs_TE, routing.valid_T) / tokens
    if weights_E is not None:
        fraction_E = fraction_E * weights_E
    return num_experts * (fraction_E * probability_E).sum()


def router_z_loss(routing: Routing, global_tokens: Tensor) -> Tensor:
    """This rank's part of the mean over tokens of ``logsumexp(logits)^2``."""
    squared_T = routing.logits_TE.float().logsumexp(dim=-1).square()
    return _masked_sum(squared_T, routing.valid_T) / global_tokens.clamp(min=1).float()


class TokenLoss(NamedTuple):
    """A loss that is a mean over tokens, as the z-loss is.

    Attributes:
        coefficient: that it is multiplied by.
        values_T: fp32 [T], of each token, with gradients.
    """

    coefficient: float
    values_T: Tensor

    def part(self, valid_T: Tensor | None, global_tokens: Tensor) -> Tensor:
        """This rank's part of the loss: the sum over all ranks is that of the global batch."""
        return self.coefficient * _masked_sum(self.values_T, valid_T) / global_tokens.clamp(min=1).float()


def add_balance(
    output_TH: Tensor,
    routed: Routed,
    members_VT: Tensor,
    load: PassLoad | StackLoad,
    place: int,
    balance: float,
    z: float,
    losses: Sequence[TokenLoss] = (),
    weights_E: Tensor | None = None,
) -> Tensor:
    """The output of a module, whose backward pass adds the gradients of its balance and z-loss, and of others.

    The losses are those of each view by itself, in the mean over views, times ``load.share``.

    Args:
        members_VT: fp32 [V, T], 1 where a token counts for a view.
        load: of the pass; summed over ranks by the time of the backward pass.
        place: of the module in it.
        balance, z: coefficients of the two losses.
        losses: further ones.
        weights_E: fp32 [E], of the experts' terms of the balance loss; None for ones.
    """
    sums_VX = routed.balance_sums(members_VT, bool(z) or bool(losses))
    if weights_E is not None:  # of the probabilities, and one of the squares
        sums_VX = sums_VX * F.pad(weights_E, (0, sums_VX.shape[1] - len(weights_E)), value=1.0)
    if losses:
        own_VO = members_VT @ torch.stack([loss.values_T for loss in losses], dim=1)
        sums_VX = torch.cat([sums_VX, own_VO], dim=1)
    coefficients = (z, *(loss.coefficient for loss in losses))
    top_k = routed.experts_TK.shape[1] if routed.chosen_TK is None else None
    if isinstance(load, StackLoad):
        load.leave(place, sums_VX, (top_k, balance, coefficients))
        return output_TH
    return join_balance(output_TH, sums_VX, load, place, (top_k, balance, coefficients))


def join_balance(
    output: Tensor,
    sums: Tensor,
    load: PassLoad,
    place: int | slice,
    settings: BalanceSettings,
) -> Tensor:
    """The same output, whose backward pass gives the sums their gradients.

    Args:
        output: of a module, or of layers with all modules.
        sums: of the module [V, X], or of all of them, [L, V, X]; see `add_balance`.
        place: of the module, or ``slice(None)``.
        settings: of the modules, which have the same.
    """
    return _AddBalance.apply(output, sums, load, place, *settings)


class _AddBalance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output_TH: Tensor,
        sums_VX: Tensor,
        load: PassLoad,
        place: int | slice,
        top_k: int | None,
        balance: float,
        coefficients: tuple[float, ...],
    ) -> Tensor:
        ctx.load, ctx.place, ctx.settings, ctx.columns = load, place, (top_k, balance, coefficients), sums_VX.shape[-1]
        return output_TH.view_as(output_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        load: PassLoad = ctx.load
        grad_LVX = load.once(ctx.settings, lambda counts_LVX: _sum_gradients(counts_LVX, load.share, *ctx.settings))
        return gradients[0], grad_LVX[ctx.place, ..., : ctx.columns], None, None, None, None, None


def _sum_gradients(
    counts_LVX: Tensor, share: float, top_k: int | None, balance: float, coefficients: tuple[float, ...]
) -> Tensor:
    """Gradients of the losses by what `Routed.balance_sums` gives and by the sums of further losses, fp32
    [L, V, E + 1 + further ones], from `PassLoad.all`.

    Args:
        top_k: experts of every token; None where tokens have unequal numbers, of which the sum is counted.
        coefficients: of the z-loss, and of the further losses.
    """
    views, experts = counts_LVX.shape[1], counts_LVX.shape[2] // 2 - 1
    tokens_LV1 = counts_LVX[..., -2:-1].clamp(min=1).float()
    share_LV1 = share / views / tokens_LV1
    # Of experts * sum_e (asked_e / routes) * (sum of probabilities_e / tokens); of top_k experts each, the routes are
    # top_k * tokens.
    if top_k is not None:
        of_asked_LV1 = share_LV1 * (balance * experts / top_k) / tokens_LV1
    else:
        of_asked_LV1 = share_LV1 * (balance * experts) / counts_LVX[..., :experts].sum(-1, keepdim=True).clamp(min=1)
    grad_LVE = counts_LVX[..., :experts] * of_asked_LV1
    return torch.cat([grad_LVE, *(share_LV1 * each for each in coefficients)], dim=2)


BatchLoss = Callable[[Tensor, Tensor], Tensor]
"""A loss of the sums over the tokens of each view, fp32 [V, S], and of their numbers, fp32 [V]
(`mome_dist.moe.routers.base.Router.batch_loss`)."""


def batch_sums(routings: Sequence[Routing]) -> tuple[Tensor, Tensor]:
    """What a `BatchLoss` is of, from the routes of a whole batch: those of each view, with its tokens marked valid."""
    sums_VS, tokens_V = [], []
    for routing in routings:
        assert routing.values_TS is not None and routing.valid_T is not None
        sums_VS.append(_masked_sum(routing.values_TS, routing.valid_T))
        tokens_V.append(routing.valid_T.sum())
    return torch.stack(sums_VS), torch.stack(tokens_V).clamp(min=1).float()


def add_batch_loss(output_TH: Tensor, sums_VS: Tensor, load: PassLoad, place: int, batch_loss: BatchLoss) -> Tensor:
    """The output of a module, whose backward pass adds the gradients of a loss of the global batch that is no mean over
    tokens, times ``load.share``.

    Args:
        sums_VS: fp32 [V, S], of this rank's tokens, with gradients.
        load: of the pass, where these sums were put; summed over ranks by the time of the backward pass.
    """
    return _AddBatchLoss.apply(output_TH, sums_VS, load, place, batch_loss)


class _AddBatchLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output_TH: Tensor, sums_VS: Tensor, load: PassLoad, place: int, batch_loss: BatchLoss
    ) -> Tensor:
        ctx.load, ctx.place, ctx.batch_loss = load, place, batch_loss
        return output_TH.view_as(output_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        load: PassLoad = ctx.load
        tokens_V = load.of(ctx.place)[:, -2].clamp(min=1).float()
        with torch.enable_grad():
            sums_VS = load.sums_of(ctx.place).detach().requires_grad_()
            (grad_VS,) = torch.autograd.grad(ctx.batch_loss(sums_VS, tokens_V), sums_VS)
        return gradients[0], load.share * grad_VS, None, None, None


def updated_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The router bias after a step: ``bias + rate * sign(mean load - load)``, fp32 [E].

    Args:
        bias_E: fp32 [E].
        load_E: int64 [E], routes to each expert in the whole global batch, before any drop and without padding.
        rate: of the update, in units of the score.
    """
    # In whole numbers: an expert at exactly the mean stays, and no rank can round to another sign.
    return bias_E + rate * torch.sign(load_E.sum() - load_E.numel() * load_E).to(bias_E.dtype)
