"""Low-rank terms of the LLM's query and value projections on a tensor-parallel rank.

``A h`` is computed from what the attention reads, which under sequence parallelism is a rank's own tokens; what is
narrow then travels, and each rank has the rows of B that belong to its heads. All terms are one product each way: every
token has all of ``A h``, and what its view does not use is multiplied by zero. So a term that no token uses has a
gradient of exact zeros on every rank, and no rank ever waits for one that has none.

Shape suffixes: N tokens, V views, K terms, r rank, Z the rank's queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mome_dist.adapters.lora import initial_factor
from mome_dist.adapters.terms import LowRankTerms
from mome_dist.packed_module import PackedModule, PackedTensor
from mome_dist.parallel.parts import NamedPart
from mome_dist.sharing import Sharing
from mome_dist.token_context import TokenContext
from mome_dist.transfer import sent_to


class TermsOfTokens:
    """Which terms each token of a pass uses, found out once for all layers of a stage.

    Args:
        terms: what there is.
    """

    def __init__(self, terms: LowRankTerms) -> None:
        self._terms = terms
        self._uses = {str(view): terms.of(view) for view in terms.views}
        self._latest: tuple[TokenContext, Tensor] | None = None

    def __call__(self, context: TokenContext, dtype: torch.dtype) -> Tensor:
        """[N, K]: the scale where a token uses a term, else zero; nothing for dead tokens."""
        if self._latest is None or self._latest[0] is not context:
            used = [[name in self._uses[view] for name in self._terms.names] for view in context.view_names]
            uses_VK = sent_to(self._terms.scale * torch.tensor(used, dtype=torch.float32), context.members_VN.device)
            self._latest = context, (context.members_VN.T @ uses_VK).to(dtype)
        return self._latest[1]


class TensorParallelLoRA(PackedModule):
    """The terms of one layer on a tensor-parallel rank.

    Args:
        terms: what there is.
        layer: of the LLM, from zero.
        hidden_size: H.
        query_width, value_width: of all ranks' projections together.
        ranks: tensor-parallel ones.
        sequence_parallel: whether a rank has a part of the tokens between products.
        of_tokens: shared by the layers of a stage.

    Attributes:
        a: fp32, A of all terms of the queries, then of the values, one after another.
        b: fp32, the rank's rows of B, alike.
    """

    def __init__(
        self,
        terms: LowRankTerms,
        layer: int,
        hidden_size: int,
        query_width: int,
        value_width: int,
        ranks: int,
        sequence_parallel: bool,
        of_tokens: TermsOfTokens,
    ) -> None:
        super().__init__()
        self.terms, self.layer, self.hidden_size = terms, layer, hidden_size
        self.widths = {"q": query_width // ranks, "v": value_width // ranks}
        self.sequence_parallel, self.of_tokens = sequence_parallel, of_tokens
        each = len(terms.names) * terms.rank
        self.a = nn.Parameter(torch.empty(2 * each * hidden_size))
        self.b = nn.Parameter(torch.empty(each * sum(self.widths.values())))

    def tensors(self) -> Iterator[PackedTensor]:
        for factor, parameter in (("a", self.a), ("b", self.b)):
            start = 0
            for projection, width in self.widths.items():
                shape = (self.terms.rank, self.hidden_size) if factor == "a" else (width, self.terms.rank)
                for name in self.terms.names:
                    yield PackedTensor(f"{projection}.{name}.{factor}", parameter, start, shape)
                    start += math.prod(shape)

    def named_parts(self, prefix: str) -> Iterator[NamedPart]:
        """Its tensors (`mome_dist.parallel.parts.Described`)."""
        for name, parameter, start, shape in self.tensors():
            factor = name[-1]
            # A's gradient is that of a rank's own tokens; B's rows are the rank's own.
            sliced, partial = (None, True) if factor == "a" else (0, False)
            sharing = Sharing(self.layer, sliced=sliced, partial=partial, packed=f"{prefix}.{factor}")
            yield NamedPart(f"{prefix}.{name}", None, parameter, start, shape, sharing)

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        """As `mome_dist.adapters.lora.LayerLoRA.initialize`, for the rows that this rank holds."""
        for part in self.named_parts(prefix):
            part.value.copy_(part.here(initial_factor(part.name, part.whole_shape, self.terms.start, seed)))

    def forward(self, hidden_N1H: Tensor, qkv_N1Z: Tensor, groups: int, context: TokenContext) -> Tensor:
        """Add the terms to a rank's queries and values.

        Args:
            hidden_N1H: what the attention reads; under sequence parallelism, a rank's tokens.
            qkv_N1Z: what its projection gave, of all tokens: for each group of heads the queries, the key and the
                value. It is written to.
            groups: of heads on this rank.
            context: of the tokens of ``hidden_N1H``.

        Returns:
            ``qkv_N1Z``.
        """
        low_N1R = narrowed(hidden_N1H, self.a, self.of_tokens(context, hidden_N1H.dtype), self.terms.rank)
        widths = list(self.widths.values())
        return widened(qkv_N1Z, low_N1R, self.b, widths, self.terms.rank, groups, self.sequence_parallel)


def narrowed(hidden_N1H: Tensor, a: Tensor, weights_NK: Tensor, rank: int) -> Tensor:
    """What lies between the factors: ``A h`` of all terms, times what a token gives to each of them.

    Args:
        hidden_N1H: what the attention reads.
        a: fp32, A of all K terms of the queries, then of the values, one after another.
        weights_NK: of each token and term, in the dtype of the hidden states.
        rank: r.

    Returns:
        [N, 1, 2 K r], the terms of the queries first.
    """
    low_N1R = F.linear(hidden_N1H, a.to(hidden_N1H.dtype).view(-1, hidden_N1H.shape[-1]))
    low_N12Kr = low_N1R.unflatten(-1, (2, weights_NK.shape[1], rank))
    return (low_N12Kr * weights_NK[:, None, None, :, None]).flatten(2)


def widened(
    qkv_N1Z: Tensor,
    low_N1R: Tensor,
    b: Tensor,
    widths: Sequence[int],
    rank: int,
    groups: int,
    sequence_parallel: bool,
) -> Tensor:
    """Add ``B`` of what `narrowed` gives to a rank's queries and values.

    Args:
        qkv_N1Z, groups, sequence_parallel: as of `TensorParallelLoRA`; the first is written to.
        low_N1R: of a rank's tokens under sequence parallelism.
        b: fp32, the rank's rows of B, in the order of A.
        widths: of its queries, and of its values.
        rank: r.

    Returns:
        ``qkv_N1Z``.
    """
    if sequence_parallel:
        low_N1R = mappings.gather_from_sequence_parallel_region(low_N1R)
    else:
        low_N1R = mappings.copy_to_tensor_model_parallel_region(low_N1R)
    count = low_N1R.shape[-1] // (2 * rank)
    up = b.to(low_N1R.dtype).split([count * width * rank for width in widths])
    added = (
        F.linear(low, rows.view(count, -1, rank).transpose(0, 1).flatten(1))
        for low, rows in zip(low_N1R.chunk(2, dim=-1), up, strict=True)
    )
    return _AddToGroups.apply(qkv_N1Z, *added, groups)


class _AddToGroups(torch.autograd.Function):
    """Adds in place; the gradient of the whole is that of each summand where it lies."""

    @staticmethod
    def forward(ctx: Any, qkv_N1Z: Tensor, query_N1Y: Tensor, value_N1X: Tensor, groups: int) -> Tensor:
        ctx.shapes = groups, query_N1Y.shape, value_N1X.shape
        ctx.mark_dirty(qkv_N1Z)
        query, value = _of_groups(qkv_N1Z, *ctx.shapes)
        query += query_N1Y.view(query.shape)
        value += value_N1X.view(value.shape)
        return qkv_N1Z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        groups, *shapes = ctx.shapes
        query, value = (
            part.reshape(shape) for part, shape in zip(_of_groups(gradients[0], groups, *shapes), shapes, strict=True)
        )
        return gradients[0], query, value, None


def _of_groups(qkv_N1Z: Tensor, groups: int, query: torch.Size, value: torch.Size) -> tuple[Tensor, Tensor]:
    """Views of the queries [N, G, Q * d] and values [N, G, d] in the groups of heads."""
    qkv_NGX = qkv_N1Z.view(qkv_N1Z.shape[0], groups, -1)
    return qkv_NGX[..., : query[-1] // groups], qkv_NGX[..., -(value[-1] // groups) :]
