"""Routed low-rank experts of the LLM's query and value projections in one process, beside Hugging Face's attention.

What is computed is said in `mome_dist.moe.low_rank`. Experts of layer N are called ``mome.N.q.routed.a`` [E, b, H] and
``mome.N.q.routed.b`` [E, out, b], ``shared`` likewise, and ``v`` instead of ``q`` for values. They are fp32 and
multiplied in the precision of the frozen weights, whose results they are added to; the router computes in fp32.

Shape suffixes: T tokens, E routed experts, S shared ones, X both (routed first), b rank of an expert, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.moe.experts import initial_value
from mome_dist.moe.local import Kept, LocalRouted
from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.build import build_router
from mome_dist.moe.routers.spec import PLAIN, RouterSpec

PROJECTIONS = ("q", "v")
STARTS = {"a": "uniform", "b": "zero"}


def initial_factors(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The initial fp32 values of the factors of some experts, each a function of its name and the seed.

    A is uniform in +-1/sqrt(H), as PEFT has it, and B zero, so that nothing is added at first.

    Args:
        name: of the tensor, which ends in "a" or "b".
        shape: of it, experts first.
        seed: of the run.
    """
    place, _, factor = name.rpartition(".")
    each = (initial_value(f"{place}.{n}.{factor}", shape[1:], seed, STARTS[factor]) for n in range(shape[0]))
    return torch.stack(list(each))


def weights_of(gates_TE: Tensor, shared: int, scale: float, dtype: torch.dtype) -> Tensor:
    """[T, X]: what each expert's output is multiplied by, one for shared experts, times the scale."""
    gates_TX = torch.cat([gates_TE, gates_TE.new_ones(len(gates_TE), shared)], dim=1) if shared else gates_TE
    return (scale * gates_TX).to(dtype)


class Factors(nn.Module):
    """Some experts of a projection: A, fp32 [experts, b, H], and B, fp32 [experts, out, b]."""

    def __init__(self, experts: int, bottleneck: int, hidden_size: int, out: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(experts, bottleneck, hidden_size))
        self.b = nn.Parameter(torch.empty(experts, out, bottleneck))


class _QueryFactors:
    """What a router reads that asks what experts multiply hidden states with first."""

    def __init__(self, factors: Factors) -> None:
        self._factors = factors

    def first_part(self) -> Tensor:
        """As in `mome_dist.moe.routers.base.ReadableExperts`: A of the queries."""
        return self._factors.a


class _Joined(NamedTuple):
    """All experts side by side, in the precision of the products: A of both projections [2 X b, H], and B of each,
    [out, X b]."""

    a: Tensor
    q: Tensor
    v: Tensor


class LocalLowRank(LocalRouted):
    """The experts of one layer, which hooks add to its queries and values.

    Args:
        attention: of the layer, with ``q_proj`` and ``v_proj``.
        tokens: says what hidden states [B, S, H] are of.
        routed_experts, top_k, shared_experts, bottleneck, router: as of `mome_dist.moe.local.LocalMoME`.
        scale: that all they add is multiplied by.
    """

    def __init__(
        self,
        attention: Any,
        tokens: Callable[[Tensor], RoutedTokens],
        routed_experts: int,
        top_k: int,
        shared_experts: int,
        bottleneck: int,
        router: RouterSpec = PLAIN,
        scale: float = 1.0,
    ) -> None:
        hidden_size = attention.q_proj.in_features
        super().__init__(build_router(router, hidden_size, routed_experts, top_k))
        self.scale, self.shared_experts, self._tokens = scale, shared_experts, tokens
        kinds = {"routed": routed_experts, **({"shared": shared_experts} if shared_experts else {})}
        for name in PROJECTIONS:
            projection = attention.get_submodule(f"{name}_proj")
            size = bottleneck, hidden_size, projection.out_features
            self.add_module(name, nn.ModuleDict({kind: Factors(count, *size) for kind, count in kinds.items()}))
            projection.register_forward_hook(self._adder(name))
        self.router.read_experts(_QueryFactors(self._stacks("q")[0]))
        self._pack: Kept[_Joined] | None = None
        self._terms: dict[str, tuple[Tensor, Tensor]] = {}  # of the pass under way: A h times gates, and B
        attention.register_forward_pre_hook(self._read, with_kwargs=True)

    def _stacks(self, projection: str) -> list[Factors]:
        """The routed experts of "q" or "v", then the shared ones."""
        return cast(list[Factors], list(cast(nn.ModuleDict, self.get_submodule(projection)).values()))

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        """As `LocalRouted.initialize`."""
        super().initialize(prefix, seed)
        for projection in PROJECTIONS:
            for name, value in self.get_submodule(projection).named_parameters():
                value.copy_(initial_factors(f"{prefix}.{projection}.{name}", tuple(value.shape), seed))

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; frees the joined weights, in either mode."""
        self._pack = None
        return super().train(mode)

    def _read(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose experts and multiply with A, once for queries and values."""
        hidden_BSH: Tensor = args[0] if args else kwargs["hidden_states"]
        if self.device != hidden_BSH.device:
            self.to(hidden_BSH.device)  # the layers of an LLM that was spread over devices say where each belongs
        hidden_TH, tokens, dtype = hidden_BSH.flatten(0, 1), self._tokens(hidden_BSH), hidden_BSH.dtype
        learning = self.training or torch.is_grad_enabled()
        if learning:
            gates_TE, joined = self._route(hidden_TH.float(), tokens).gates_TE(), self._join(dtype)
        else:
            self.last_routing = None
            experts_TK, gates_TK = self._choose(hidden_TH, None, tokens)
            gates_TE = gates_TK.new_zeros(len(hidden_TH), self.router.experts).scatter_add(1, experts_TK, gates_TK)
            joined = self._kept(dtype)
        weights_TX = weights_of(gates_TE, self.shared_experts, self.scale, dtype)
        low_T2Xb = F.linear(hidden_TH, joined.a).unflatten(1, (2, weights_TX.shape[1], -1))
        low_BSR = (low_T2Xb * weights_TX[:, None, :, None]).flatten(1).unflatten(0, hidden_BSH.shape[:2])
        self._terms = dict(zip(PROJECTIONS, zip(low_BSR.chunk(2, dim=-1), joined[1:], strict=True), strict=True))

    def _adder(self, projection: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + F.linear(*self._terms.pop(projection))

        return add

    def _join(self, dtype: torch.dtype) -> _Joined:
        of = {projection: self._stacks(projection) for projection in PROJECTIONS}
        a = [stack.a.flatten(0, 1) for stacks in of.values() for stack in stacks]
        b = (torch.cat([stack.b for stack in stacks]).transpose(0, 1).flatten(1).to(dtype) for stacks in of.values())
        return _Joined(torch.cat(a).to(dtype), *b)

    def _kept(self, dtype: torch.dtype) -> _Joined:
        """The weights as they are now, joined once for any number of passes."""
        if torch.compiler.is_compiling() and self._pack is not None:
            return self._pack.made  # of the pass before, over the prefix, which is never compiled
        sources = [part for projection in PROJECTIONS for s in self._stacks(projection) for part in (s.a, s.b)]
        if self._pack is None or not self._pack.is_of(cast(list[Tensor], sources), dtype):
            self._pack = Kept(self._join(dtype), cast(list[Tensor], sources), dtype)
        return self._pack.made
