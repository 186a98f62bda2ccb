"""What every router is: logits of the experts for each token, a choice among them, and gates.

A router is one module that training, evaluation, export and the proof of layouts share. It is fp32 whatever the
precision of the hidden states, and it looks at each token by itself: ranks have different tokens.

Shape suffixes: T tokens, H hidden size, E routed experts, K experts a token at most, R products of a token with rows of
the router's maps, N tokens in a `TokenContext`, V views.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.balance import TokenLoss, updated_bias
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routing import Routing, choose_experts, route
from mome_dist.packed_module import PackedModule, PackedTensor


class RoutedTokens(Protocol):
    """What a router may ask of the tokens beside their hidden states: `mome_dist.token_context.TokenContext` in
    training, `mome_dist.token_context.OneView` in one process."""

    @property
    def view_names(self) -> tuple[str, ...]:
        """Names of the views that the tokens belong to."""

    @property
    def members_VN(self) -> Tensor:
        """fp32 [V, N], 1 where a token belongs to a view, else 0."""

    @property
    def modality_N(self) -> Tensor | None:
        """int8 [N] (`mome_dist.token_context.Modality`); None if all are text."""

    @property
    def alive_N(self) -> Tensor | None:
        """bool [N], False for tokens that count for nothing; None if all do."""

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What is computed of the tokens, without gradients, for all layers when the first of them asks."""


class ReadableExperts(Protocol):
    """The routed experts of a module, all of them on this rank."""

    def first_part(self) -> Tensor:
        """fp32 [E, b, H], what each expert multiplies hidden states with first, with gradients."""


class TopKForm(NamedTuple):
    """A choice that the fused kernel makes: `mome_dist.moe.routing.route` of the logits."""

    top_k: int
    renormalize: bool
    score: str
    bias_E: Tensor | None


class Router(PackedModule):
    """A subclass makes its parameters in `__init__` and gives `logits`, or if these are products with rows, `maps`.
    Where it also chooses by itself, it overrides `route`.

    Its parameters are saved as ``mome.LAYER.router_NAME``, and so are its buffers, which are state that no gradient
    trains. No name may have "expert" in it: DeepSpeed takes such parameters for those of experts. ``weight`` is a map
    with a row for each expert. Parameters are made in the order of their names, which is theirs in an engine's
    checkpoints.

    Args:
        spec: what is configured.
        hidden_size, experts, top_k: H, Nr and K of the paper. `Routing.experts_TK` has ``top_k`` columns.

    Attributes:
        spec, hidden_size, experts, top_k: as given.
        bias: fp32 [E], added to the scores for the choice and only there; None without.
        passes: of a token through the experts, each with a choice of its own; one for most routers.
        turn: which of them is under way; modules set it.
    """

    bias: Tensor | None

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.spec, self.hidden_size, self.experts, self.top_k = spec, hidden_size, experts, top_k
        self.passes, self.turn = spec.settings.passes, 0
        self.register_buffer("bias", torch.zeros(experts) if spec.bias_rate > 0 else None)

    def read_experts(self, experts: ReadableExperts) -> None:
        """Told once, before anything else, whose choice it is; most routers do not ask."""

    # -- what a router computes

    def logits(self, hidden_TH: Tensor, tokens: RoutedTokens | None) -> Tensor:
        """fp32 [T, E], of hidden states in any precision.

        Args:
            tokens: as many as ``hidden_TH`` has; None where the caller knows nothing of them, for routers that do not
                ask.
        """
        maps_RH = self.maps(tokens)
        assert maps_RH is not None, "a router without maps has logits of its own"
        return self.logits_of(F.linear(hidden_TH.float(), maps_RH), tokens)

    def maps(self, tokens: RoutedTokens | None) -> Tensor | None:
        """fp32 [R, H], rows that hidden states are multiplied with, after which `logits_of` needs them no more; None if
        the router does something else with them. In evaluation these rows are laid out beside the experts' own."""
        return None

    def logits_of(self, products_TR: Tensor, tokens: RoutedTokens | None) -> Tensor:
        """fp32 [T, E], of the products with `maps` of the same tokens."""
        return products_TR

    def used(self, tokens: RoutedTokens | None) -> Hashable:
        """What of the maps these tokens use, if not all use the same: rows are laid out again where it changes."""
        return None

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        """The experts of each token and their gates; see `Routing` for tokens that use less than K."""
        form, alive_T = self._form(), None if tokens is None else tokens.alive_N
        return route(logits_TE, form.top_k, form.renormalize, alive_T, score=form.score, bias_E=form.bias_E)

    def choose(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> tuple[Tensor, Tensor]:
        """``experts_TK`` and ``gates_TK`` of `route` and nothing else: for passes that nobody takes a loss of. An
        expert that stands in several columns of a token counts as often, with the gate of each."""
        if self.decides:
            routing = self.route(logits_TE, tokens)
            return routing.experts_TK, routing.gates_TK
        form = self._form()
        return choose_experts(logits_TE, form.top_k, form.renormalize, score=form.score, bias_E=form.bias_E)

    def losses(self, routing: Routing) -> Sequence[TokenLoss]:
        """Losses beside the balance and the z-loss, which every router has: means over the tokens of a view in the
        global batch. Always as many, with the same coefficients."""
        return ()

    def batch_loss(self, sums_VS: Tensor, tokens_V: Tensor) -> Tensor:
        """A loss of the global batch that is no mean over tokens, fp32 scalar, with its coefficient in it: of means
        over tokens, for example. `route` then gives `Routing.values_TS`.

        Args:
            sums_VS: fp32 [V, S], sums of these values over the tokens of each view, with gradients.
            tokens_V: fp32 [V], how many these are, at least one.
        """
        raise NotImplementedError

    def forward(self, hidden_TH: Tensor, tokens: RoutedTokens | None) -> Routing:
        return self.route(self.logits(hidden_TH, tokens), tokens)

    def in_turn(self, hidden_TH: Tensor, one_pass: Callable[[Tensor], Tensor]) -> Tensor:
        """What the passes through the experts give together: ``x_C - h``, where ``x_0`` is h and every pass adds to x
        what it makes of it.

        Args:
            hidden_TH: h.
            one_pass: with the router at its `turn`, [T, H] -> [T, H].
        """
        if self.passes == 1:
            return one_pass(hidden_TH)
        added_TH, read_TH = torch.zeros_like(hidden_TH), hidden_TH
        for turn in range(self.passes):
            self.turn = turn
            added_TH = added_TH + one_pass(read_TH)
            read_TH = hidden_TH + added_TH
        self.turn = 0
        return added_TH

    # -- after a step

    @property
    def follows_load(self) -> bool:
        """Whether `after_step` is to be called; the same on all ranks."""
        return self.bias is not None

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        """Move what no gradient trains.

        Args:
            load_E: int64 [E], routes to each expert in the step's global batch, before any drop, without padding.
        """
        if self.bias is not None:
            self.bias.copy_(updated_bias(self.bias, load_E, self.spec.bias_rate))

    # -- what others ask

    @property
    def decides(self) -> bool:
        """Whether the router has a choice of its own, and not the top K of the scores."""
        return type(self).route is not Router.route

    @property
    def has_losses(self) -> bool:
        """Whether it has losses of its own."""
        return type(self).losses is not Router.losses

    @property
    def has_batch_loss(self) -> bool:
        """Whether it has a loss of the whole batch."""
        return type(self).batch_loss is not Router.batch_loss

    @property
    def mean_top_k(self) -> float:
        """Experts that a token uses in the mean, where loads are balanced: what a capacity factor multiplies."""
        return self.top_k

    @property
    def kernel_form(self) -> TopKForm | None:
        """The choice, if the fused kernel can make it."""
        return None if self.decides or self.has_losses or self.has_batch_loss else self._form()

    def _form(self) -> TopKForm:
        return TopKForm(self.top_k, self.spec.renormalize, self.spec.score, self.bias)

    # -- names and values

    def tensors(self) -> Iterator[PackedTensor]:
        """Every parameter and every buffer by its name in the router. One that packs several tensors into a parameter
        overrides it; they lie in the parameter in the order of their names."""
        for name, parameter in self.named_parameters():
            yield PackedTensor(name, parameter, 0, tuple(parameter.shape))
        yield from self.states()

    def states(self) -> Iterator[PackedTensor]:
        """Every buffer that is saved."""
        for name, buffer in self.named_buffers():
            if name not in self._non_persistent_buffers_set:
                yield PackedTensor(name, buffer, 0, tuple(buffer.shape))

    def trained(self) -> Iterator[PackedTensor]:
        """The tensors in parameters."""
        states = {name for name, *_ in self.states()}
        return (tensor for tensor in self.tensors() if tensor.name not in states)

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        """Set the initial values that every parallel layout starts from.

        Args:
            prefix: of the layer's module, such as "mome.3".
        """
        for tensor in self.trained():
            tensor.of(tensor.parameter).copy_(self.initial_value(f"{prefix}.router_{tensor.name}", tensor.shape, seed))

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """The initial fp32 value of a trained tensor, a function of its global name and the seed alone."""
        return initial_map(name, shape, seed)


def initial_map(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal with standard deviation 0.02, fp32, from a generator of the name and the seed."""
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 16) ^ seed)
    return torch.empty(shape).normal_(0, 0.02, generator=generator)
