"""Experts without a router: every token uses all of them. Together they are one dense bottleneck.

This is the control of a mixture: the same place, the same form, and no choice. There is nothing to balance, to count or
to drop, and every data-parallel rank holds copies, as of any trained part beside a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from mome_dist.moe.experts import CommonParts, ExpertStack
from mome_dist.moe.forms.registry import DEFAULT
from mome_dist.moe.local import Kept
from mome_dist.parallel.parts import NamedPart, whole_parts
from mome_dist.sharing import Sharing


class LocalUnrouted(nn.Module):
    """``sum_shared E_n(h)`` in one process.

    Args:
        hidden_size, shared_experts, bottleneck: H, Ns, b.
        expert: name of the experts' form.
    """

    def __init__(self, hidden_size: int, shared_experts: int, bottleneck: int, expert: str = DEFAULT) -> None:
        super().__init__()
        self.common = CommonParts(hidden_size, bottleneck, expert)
        self.shared = ExpertStack(shared_experts, hidden_size, bottleneck, expert)
        self._cast: Kept[list[list[Tensor]]] | None = None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.shared.weights()[0].device

    def initialize(self, prefix: str, seed: int) -> None:
        """As `mome_dist.moe.local.LocalMoME.initialize`."""
        self.common.initialize(f"{prefix}.common", seed)
        self.shared.initialize(f"{prefix}.shared", seed)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; frees the cast weights, in either mode."""
        self._cast = None
        return super().train(mode)

    def forward(self, hidden: Tensor, base: Tensor | None = None) -> Tensor:
        """As `mome_dist.moe.local.LocalMoME.forward`, with the same precisions."""
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        if self.training or torch.is_grad_enabled():
            output_TH = self.common.leave(self.shared(self.common.enter(hidden_TH.float()))).to(hidden.dtype)
        else:
            form, (common, shared) = self.shared.form, self._weights(hidden.dtype)
            output_TH = form.leave(form.summed(form.enter(hidden_TH, *common), shared), *common)
        output = output_TH.view(hidden.shape)
        return output if base is None else base + output

    def _weights(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """The weights as they are now, those in common and those of the experts, cast once for any number of passes."""
        stacks = self.common.weights(), self.shared.weights()
        sources = [part for stack in stacks for part in stack]
        compiling = torch.compiler.is_compiling()  # of the pass before, over the prefix, which is never compiled
        if self._cast is None or not (compiling or self._cast.is_of(sources, dtype)):
            self._cast = Kept([[part.detach().to(dtype) for part in stack] for stack in stacks], sources, dtype)
        return self._cast.made


class UnroutedExperts(nn.Module):
    """The same as a rank has it beside one layer: a `mome_dist.parallel.parts.Described`.

    Args:
        layer: number of the layer.
        others: as of `LocalUnrouted`.
    """

    def __init__(
        self, layer: int, hidden_size: int, shared_experts: int, bottleneck: int, expert: str = DEFAULT
    ) -> None:
        super().__init__()
        self.layer = layer
        self.common = CommonParts(hidden_size, bottleneck, expert)
        self.shared = ExpertStack(shared_experts, hidden_size, bottleneck, expert)

    def initialize(self, prefix: str, seed: int) -> None:
        """As `mome_dist.moe.local.LocalMoME.initialize`."""
        self.common.initialize(f"{prefix}.common", seed)
        self.shared.initialize(f"{prefix}.shared", seed)

    def forward(self, hidden: Tensor, *_counted: object) -> Tensor:
        """[..., H] -> [..., H] in the same dtype, which is that of the products."""
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        return self.common.leave(self.shared(self.common.enter(hidden_TH))).view(hidden.shape)

    def begin(self, hidden: Tensor, *counted: object) -> Callable[[], Tensor]:
        """As `mome_dist.moe.expert_parallel.ExpertParallelMoME.begin`; nothing travels."""
        return partial(self, hidden, *counted)

    def prefetch(self, dtype: torch.dtype) -> None:
        """Nothing travels."""

    def named_parts(self, prefix: str) -> Iterator[NamedPart]:
        """Its tensors; under sequence parallelism a rank's gradient is that of its own tokens."""
        return whole_parts(prefix, self, Sharing(self.layer, partial=True))
