"""Low-rank terms (LoRA, Hu et al., 2021) of the query and value projections of the frozen LLM, in one process.

``q_proj(h) + scale * sum B A h``, and alike for values: before heads are told apart and before rotary positions,
without bias and without dropout. The sum goes over the terms that the view of a token uses
(`mome_dist.adapters.terms`). A and B are fp32 and multiplied in the precision of the frozen weights, whose results they
are added to.

A parameter of layer N is called ``llm_lora.N.q.TERM.a`` or ``.b``, ``v`` instead of ``q`` for values.
`mome_dist.adapters.tensor_parallel` is the form of a tensor-parallel rank.

PEFT's layers are not used: they wrap torch's, and these are Megatron-Core's, sliced over ranks, with terms that depend
on the view. What is exported computes the same in PEFT (`tests/unit/test_peft.py`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.adapters.terms import LowRankTerms, View

PREFIX = "llm_lora"


def initial_factor(name: str, shape: tuple[int, ...], start: str, seed: int) -> Tensor:
    """The initial fp32 value of a factor, a function of its name and the seed.

    One of A and B is uniform in +-1/sqrt(its columns), as `nn.init.kaiming_uniform_` with ``a=sqrt(5)`` gives it, the
    other zero: PEFT's usual way is a random A, the authors of Llama-AVSR start with a random B.

    Args:
        name: of the parameter, which ends in "a" or "b".
        shape: of the whole factor.
        start: "a_random" or "b_random".
        seed: of the run.
    """
    if name[-1] != start[0]:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 16) ^ seed)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class LowRank(nn.Module):
    """The factors of one term: A, fp32 [rank, in], and B, fp32 [out, rank]."""

    def __init__(self, rank: int, width: int, out: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.empty(out, rank))


class LayerLoRA(nn.Module):
    """The terms of one layer.

    Args:
        terms: what there is.
        hidden_size: H.
        query_width, value_width: of what the projections give.
    """

    def __init__(self, terms: LowRankTerms, hidden_size: int, query_width: int, value_width: int) -> None:
        super().__init__()
        self.terms = terms
        for name, out in (("q", query_width), ("v", value_width)):
            self.add_module(name, nn.ModuleDict({term: LowRank(terms.rank, hidden_size, out) for term in terms.names}))

    def factors(self, projection: str, names: Iterable[str]) -> list[LowRank]:
        """The terms of "q" or "v" of some names."""
        of_projection = cast(nn.ModuleDict, self.get_submodule(projection))
        return [cast(LowRank, of_projection[name]) for name in names]

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        """Set the initial values that every parallel layout starts from; ``prefix`` is the module's global name."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_factor(f"{prefix}.{name}", tuple(parameter.shape), self.terms.start, seed))


class OneProcessLoRA(LayerLoRA):
    """The terms of one layer of Hugging Face's model, which hooks add.

    Args:
        attention: of the layer, with ``q_proj`` and ``v_proj``.
        view: gives the view of the pass that is under way.
    """

    def __init__(self, terms: LowRankTerms, attention: Any, view: Callable[[], View]) -> None:
        projections = {"q": attention.q_proj, "v": attention.v_proj}
        widths = [projection.out_features for projection in projections.values()]
        super().__init__(terms, attention.q_proj.in_features, *widths)
        self._view = view
        self._laid_out: dict[str, tuple[Tensor, Tensor]] | None = None
        for name, projection in projections.items():
            projection.register_forward_hook(self._hook(name))

    @contextmanager
    def laid_out(self) -> Iterator[None]:
        """Inside, the factors of a projection are joined and cast in the first pass only: for many passes over a few
        tokens, of one view and without gradients."""
        self._laid_out = {}
        try:
            yield
        finally:
            self._laid_out = None

    def _hook(self, projection: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            hidden = args[0]
            if self._laid_out is None:
                chosen = self._chosen(projection, hidden)
                return output + self.terms.scale * sum(_product(hidden, each.a, each.b) for each in chosen)
            if projection not in self._laid_out:
                chosen = self._chosen(projection, hidden)
                a, b = torch.cat([each.a for each in chosen]), torch.cat([each.b for each in chosen], dim=1)
                self._laid_out[projection] = a.to(hidden.dtype), (self.terms.scale * b).to(hidden.dtype)
            return output + _product(hidden, *self._laid_out[projection])

        return add

    def _chosen(self, projection: str, hidden: Tensor) -> list[LowRank]:
        """The terms that the view of the pass uses, where the layer is: an LLM may be spread over devices."""
        chosen = self.factors(projection, self.terms.of(self._view()))
        if chosen[0].a.device != hidden.device:
            self.to(hidden.device)
        return chosen


def _product(hidden: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.linear(hidden, a.to(hidden.dtype)), b.to(hidden.dtype))
