"""What a router is built from, and what is known of it before it is built: no torch here.

A run's configuration becomes a `RouterSpec`. What only one kind of router has lies in its settings, whose class also
says what the kind can and cannot do, and how large it is: validation, planner and reports ask that class, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mome_dist.adapters.terms import View


@dataclass(frozen=True)
class RouterSettings:
    """What a kind of router has beside what all have. A kind with keys of its own has a subclass, the fields of which
    are the keys ``mome.router.*``; a field may have ``choices`` in its metadata.

    Attributes:
        scores: that ``mome.score`` may name.
        renormalizes: what ``mome.renormalize`` may be.
        takes_bias: whether ``mome.bias_rate`` may be above 0.
        dispatches: that ``mome.dispatch`` may name.
        reads_experts: whether it multiplies hidden states with the experts' own first map.
        batch_invariant: whether a token's experts depend on nothing but the token. Without it clips are decoded one by
            one.
    """

    scores: ClassVar[tuple[str, ...]] = ("softmax", "sigmoid")
    renormalizes: ClassVar[tuple[bool, ...]] = (True, False)
    takes_bias: ClassVar[bool] = True
    dispatches: ClassVar[tuple[str, ...]] = ("alltoall", "gather", "local")
    reads_experts: ClassVar[bool] = False
    batch_invariant: ClassVar[bool] = True

    @property
    def passes(self) -> int:
        """Passes of a token through the experts, each with a choice of its own (`mome_dist.moe.routers.chain`)."""
        return 1

    def problem(self, experts: int, top_k: int) -> str | None:
        """What is wrong with the settings, as a sentence that begins with the key and ends with the fix; None if
        nothing is."""
        return None

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        """Trained numbers of a layer's router."""
        return experts * hidden_size

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        """Those of them that one token uses."""
        return experts * hidden_size

    def outputs(self, experts: int, views: Sequence[View]) -> int:
        """Products of a token with hidden-size vectors in training, used or not."""
        return experts

    def covers(self, view: View, views: Sequence[View]) -> bool:
        """Whether a router that was trained on ``views`` knows a view."""
        return True

    def __str__(self) -> str:
        """In words, for reports; empty if there is nothing to say."""
        return ""


@dataclass(frozen=True)
class RouterSpec:
    """A router of a run, the same in every layer.

    Attributes:
        name: in the registry.
        settings: of its kind.
        score: of an expert: "softmax" over all, or "sigmoid" of its own logit.
        renormalize: whether the gates of a token are divided by their sum.
        bias_rate: above 0, the choice of experts has a bias that each step moves by so much.
        views: that the run trains on.
    """

    name: str = "top_k"
    settings: RouterSettings = RouterSettings()
    score: str = "softmax"
    renormalize: bool = True
    bias_rate: float = 0.0
    views: tuple[View, ...] = ()

    def parameters(self, hidden_size: int, experts: int) -> int:
        """As `RouterSettings.parameters`, for the run's views."""
        return self.settings.parameters(hidden_size, experts, self.views)

    def active_parameters(self, hidden_size: int, experts: int) -> int:
        """As `RouterSettings.active_parameters`, for the run's views."""
        return self.settings.active_parameters(hidden_size, experts, self.views)

    def outputs(self, experts: int) -> int:
        """As `RouterSettings.outputs`, for the run's views."""
        return self.settings.outputs(experts, self.views)

    def covers(self, view: View) -> bool:
        """As `RouterSettings.covers`, for the run's views."""
        return self.settings.covers(view, self.views)


PLAIN = RouterSpec()
"""What MoME has (arXiv 2510.04136)."""
