"""The LLM's layers as one graph forward and one backward (`mome_dist.cuda_graphs`), for passes of one number of tokens.

A pass of a few hundred tokens asks for thousands of kernels that take less time than asking does. Here the host asks
for two graphs. Embeddings, projectors, the output layer, the counts of the routers and all collectives stay outside,
so that layers must be whole on a rank.

What the host decides by lengths elsewhere is fixed here: dead tokens fill a pass up to one number, and the numbers of
sequences and of tokens of the longest one, which attention asks for, are rounded up to powers of two. Each pair of them
is captured when it first comes. Routers leave their choices and the sums of the balance losses as outputs, and the
gradients of these sums come from outside, by which time the counts of all ranks are there.

Shape suffixes: N tokens; L MoME modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.cuda_graphs.replay import Graphs, Replayed, Turn
from mome_dist.moe.balance import join_balance
from mome_dist.moe.load import PassLoad, StackLoad
from mome_dist.token_context import FixedTokens, TokenContext, aligned

Layers = Callable[[Tensor, FixedTokens, StackLoad], Tensor]


class _Sizes(NamedTuple):
    """What a graph is captured for: sequences and tokens of the longest one, at most; views; and whether hidden states
    want gradients."""

    sequences: int
    longest: int
    views: int
    wanted: bool


class GraphedStack:
    """Runs the layers of a pass of training.

    Args:
        layers: hidden states [N, 1, H] to the same.
        parameters: all of the layers'.
        graphs: what captures them.
        tokens: of a pass, which is rounded up as those of passes are.

    Attributes:
        replayed: passes so far.
        larger: passes so far that were not taken.
    """

    def __init__(self, layers: Layers, parameters: Sequence[Tensor], graphs: Graphs, tokens: int) -> None:
        self._layers, self._graphs, self._turn = layers, graphs, Turn()
        self._parameters = [each for each in parameters if each.requires_grad]
        self._tokens, self.replayed, self.larger = aligned(tokens), 0, 0
        self._captured: dict[_Sizes, tuple[Replayed, StackLoad]] = {}

    @property
    def captured(self) -> int:
        """Graphs so far."""
        return len(self._captured)

    def describe(self) -> str:
        """One line on what was done so far."""
        return (
            f"layers in graphs: {self.replayed:,} microbatches of {self._tokens:,} tokens, {self.captured} captured; "
            f"{self.larger:,} microbatches had more tokens and were run without"
        )

    def takes(self, context: TokenContext) -> bool:
        """Whether a pass has the number of tokens; one that needs more is counted, to be run layer by layer."""
        taken = context.tokens == self._tokens
        self.larger += not taken
        return taken

    def __call__(self, hidden_N1H: Tensor, context: TokenContext, load: PassLoad) -> Tensor:
        """[N, 1, H] -> [N, 1, H]; leaves in ``load`` what the layers' routers did, and joins its gradients."""
        sequences = _power_of_two(context.starts_B1.numel() - 1)
        longest = min(_power_of_two(context.longest), context.tokens)
        sizes = _Sizes(sequences, longest, len(context.members_VN), hidden_N1H.requires_grad)
        alive_N = context.alive_N
        if alive_N is None:
            alive_N = torch.ones_like(context.modality_N, dtype=torch.bool)
        starts_B1 = F.pad(context.starts_B1, (0, sequences + 1 - context.starts_B1.numel()), value=context.tokens)
        inputs = hidden_N1H, context.members_VN, context.modality_N, alive_N, context.positions_N, starts_B1
        if sizes not in self._captured:
            self._captured[sizes] = self._capture(sizes, inputs)
        replayed, left = self._captured[sizes]
        output_N1H, *counted = replayed(*inputs)
        self.replayed += 1
        if counted:
            for place, experts_TK in enumerate(counted[0].unbind()):
                load.put(place, context, left.experts, experts_TK)
        if left.settings is not None:
            output_N1H = join_balance(output_N1H, counted[1], load, slice(None), left.settings)
        return output_N1H

    def _capture(self, sizes: _Sizes, inputs: Sequence[Tensor]) -> tuple[Replayed, StackLoad]:
        told = StackLoad()

        def run(hidden_N1H: Tensor, *of_tokens: Tensor) -> tuple[Tensor, ...]:
            members_VN, modality_N, alive_N, positions_N, starts_B1 = of_tokens
            # Made anew for every run: what the layers find out of the tokens is part of the graph.
            tokens = FixedTokens(members_VN, modality_N, alive_N, positions_N, starts_B1, sizes.longest)
            load = StackLoad()
            output_N1H = self._layers(hidden_N1H, tokens, load)
            told.experts, told.settings = load.experts, load.settings
            return output_N1H, *load.tensors()

        return Replayed(self._graphs, self._turn, run, inputs, self._parameters), told


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
