"""All kinds of routers by name: their settings, and where their code is. No torch here.

``mome.router.name`` names one. docs/tutorials/own-router.md says how to add another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mome_dist.adapters.terms import View
from mome_dist.moe.routers.group_settings import (
    ConditionSettings,
    GroupsSettings,
    HashSettings,
    LimoeSettings,
    SeparateSettings,
    SmarSettings,
)
from mome_dist.moe.routers.spec import RouterSettings, negative


@dataclass(frozen=True)
class TopKSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.top_k.TopKRouter`."""

    reroutes = True


@dataclass(frozen=True)
class TopPSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.top_p.TopPRouter`.

    Attributes:
        p: probability that a token's experts exceed together, if K of them do.
        entropy_loss: coefficient of the mean entropy of the probabilities, in nats.
    """

    scores = ("softmax",)
    renormalizes = (False,)
    takes_bias = False
    p: float = 0.4
    entropy_loss: float = 1e-4

    def problem(self, experts: int, top_k: int) -> str | None:
        if not 0 < self.p <= 1:
            return f"p={self.p}: a probability is above 0 and at most 1; set such as 0.4."
        return negative("entropy_loss", self.entropy_loss)

    def __str__(self) -> str:
        return f"experts up to a probability of {self.p:g}"


@dataclass(frozen=True)
class NullSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.null_experts.NullRouter`.

    Attributes:
        nulls: M, null experts.
        null_loss: coefficient of their part of the load-balance loss.
    """

    scores = ("softmax",)
    renormalizes = (True,)
    takes_bias = False
    nulls: int = 23
    null_loss: float = 0.01

    def problem(self, experts: int, top_k: int) -> str | None:
        return negative("nulls", self.nulls) or negative("null_loss", self.null_loss)

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.outputs(experts, views) * hidden_size

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.outputs(experts, views) * hidden_size

    def outputs(self, experts: int, views: Sequence[View]) -> int:
        return experts + self.nulls

    def __str__(self) -> str:
        return f"{self.nulls} null experts"


@dataclass(frozen=True)
class CosineSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.cosine.CosineRouter`.

    Attributes:
        width: D of the projection; None for half the experts.
        temperature: tau at first.
    """

    reroutes = True
    width: int | None = None
    temperature: float = 0.3

    def width_for(self, experts: int) -> int:
        """D."""
        return self.width or max(experts // 2, 1)

    def problem(self, experts: int, top_k: int) -> str | None:
        if self.width is not None and self.width < 1:
            return f"width={self.width}: set 1 or more, or null."
        if not 0.01 <= self.temperature < math.inf:
            return f"temperature={self.temperature}: set 0.01 or more."
        return None

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.width_for(experts) * (hidden_size + experts) + 1

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.parameters(hidden_size, experts, views)

    def outputs(self, experts: int, views: Sequence[View]) -> int:
        return self.width_for(experts)

    def __str__(self) -> str:
        return f"cosines, temperature {self.temperature:g} at first"


@dataclass(frozen=True)
class RandomSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.random.RandomRouter`.

    Attributes:
        anew: whether every pass of training draws, in place of a fixed map.
    """

    learns = False
    scores = ("softmax",)
    renormalizes = (True,)
    anew: bool = False

    @property
    def draws(self) -> bool:
        return self.anew

    @property
    def evaluates_as_trained(self) -> bool:
        return not self.anew

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return 0

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return 0

    def __str__(self) -> str:
        return "random experts, drawn in every pass" if self.anew else "random experts"


@dataclass(frozen=True)
class AutonomySettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.autonomy.AutonomyRouter`."""

    scores = ("softmax",)
    dispatches = ("local",)

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return 0

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return 0

    def __str__(self) -> str:
        return "experts by how strongly they answer"


@dataclass(frozen=True)
class MixtureSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.mixture.MixtureRouter`.

    Attributes:
        sub_routers: that the main router mixes.
    """

    reroutes = True
    scores = ("softmax",)
    sub_routers: int = 3

    def problem(self, experts: int, top_k: int) -> str | None:
        return None if self.sub_routers >= 1 else f"sub_routers={self.sub_routers}: set 1 or more."

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.outputs(experts, views) * hidden_size

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.parameters(hidden_size, experts, views)

    def outputs(self, experts: int, views: Sequence[View]) -> int:
        return self.sub_routers * (1 + experts)

    def __str__(self) -> str:
        return f"{self.sub_routers} routers, mixed"


@dataclass(frozen=True)
class BilevelSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.bilevel.BilevelRouter`.

    Attributes:
        groups: of experts.
        top_groups: the most groups that a token's experts are of; None for any.
        group_loss: coefficient of the load-balance loss of groups.
    """

    scores = ("softmax",)
    takes_bias = False
    groups: int = 4
    top_groups: int | None = None
    group_loss: float = 0.01

    def problem(self, experts: int, top_k: int) -> str | None:
        if not 1 <= self.groups <= experts:
            return f"groups={self.groups}: set 1 to mome.routed_experts={experts}."
        if self.top_groups is not None and not 1 <= self.top_groups <= self.groups:
            return f"top_groups={self.top_groups}: set 1 to groups={self.groups}, or null."
        most = (self.top_groups or self.groups) * (experts // self.groups)
        if self.top_groups is not None and top_k > most:
            own = f"so many groups may have {most} experts, less than mome.top_k={top_k}"
            return f"top_groups={self.top_groups}: {own}: raise it, or set null."
        return negative("group_loss", self.group_loss)

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.outputs(experts, views) * hidden_size

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.parameters(hidden_size, experts, views)

    def outputs(self, experts: int, views: Sequence[View]) -> int:
        return experts if self.groups in (1, experts) else self.groups + experts

    def __str__(self) -> str:
        return f"{self.groups} groups of experts, one chosen after the other"


@dataclass(frozen=True)
class DenseGradientSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.dense_gradient.DenseGradientRouter`."""

    dispatches = ("gather", "local")

    def __str__(self) -> str:
        return "learns from all experts"


@dataclass(frozen=True)
class WorkspaceSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.gw_moe.WorkspaceRouter`.

    Attributes:
        threshold: entropy above which a token goes to all experts in training, as a share of ln N.
    """

    scores = ("softmax",)
    dispatches = ("gather", "local")
    threshold: float = 0.9

    @property
    def evaluates_as_trained(self) -> bool:
        return self.threshold == 1

    def problem(self, experts: int, top_k: int) -> str | None:
        if not 0 <= self.threshold <= 1:
            return f"threshold={self.threshold}: a share of the largest entropy is from 0 to 1; set such as 0.9."
        return None

    def __str__(self) -> str:
        return f"all experts above {self.threshold:g} of the largest entropy"


@dataclass(frozen=True)
class ExpertChoiceSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.expert_choice.ExpertChoiceRouter`."""

    scores = ("softmax",)
    renormalizes = (False,)
    takes_bias = False
    dispatches = ("gather", "local")
    whole_sequences = True

    def __str__(self) -> str:
        return "experts choose speech tokens"


@dataclass(frozen=True)
class GrinSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.grin.GrinRouter`.

    Attributes:
        epsilon: half of how far below the largest logit, relative to it, one may be that is drawn.
    """

    scores = ("softmax",)
    renormalizes = (False,)
    takes_bias = False
    only_top_k = 2
    epsilon: float = 0.01

    @property
    def evaluates_as_trained(self) -> bool:
        return False

    @property
    def draws(self) -> bool:
        return True

    def problem(self, experts: int, top_k: int) -> str | None:
        return negative("epsilon", self.epsilon)

    def __str__(self) -> str:
        return f"two experts, drawn in training within {self.epsilon:g}"


class Kind(NamedTuple):
    """A kind of router.

    Attributes:
        settings: the class of its settings.
        router: ``module:class`` of its code.
    """

    settings: type[RouterSettings]
    router: str


ROUTERS: dict[str, Kind] = {
    "top_k": Kind(TopKSettings, "mome_dist.moe.routers.top_k:TopKRouter"),
    "separate": Kind(SeparateSettings, "mome_dist.moe.routers.separate:SeparateRouter"),
    "top_p": Kind(TopPSettings, "mome_dist.moe.routers.top_p:TopPRouter"),
    "null_experts": Kind(NullSettings, "mome_dist.moe.routers.null_experts:NullRouter"),
    "cosine": Kind(CosineSettings, "mome_dist.moe.routers.cosine:CosineRouter"),
    "random": Kind(RandomSettings, "mome_dist.moe.routers.random:RandomRouter"),
    "hash": Kind(HashSettings, "mome_dist.moe.routers.hashed:HashRouter"),
    "groups": Kind(GroupsSettings, "mome_dist.moe.routers.groups:GroupsRouter"),
    "limoe": Kind(LimoeSettings, "mome_dist.moe.routers.limoe:LimoeRouter"),
    "autonomy": Kind(AutonomySettings, "mome_dist.moe.routers.autonomy:AutonomyRouter"),
    "smar": Kind(SmarSettings, "mome_dist.moe.routers.smar:SmarRouter"),
    "condition": Kind(ConditionSettings, "mome_dist.moe.routers.condition:ConditionRouter"),
    "mixture_of_routers": Kind(MixtureSettings, "mome_dist.moe.routers.mixture:MixtureRouter"),
    "bilevel": Kind(BilevelSettings, "mome_dist.moe.routers.bilevel:BilevelRouter"),
    "dense_gradient": Kind(DenseGradientSettings, "mome_dist.moe.routers.dense_gradient:DenseGradientRouter"),
    "gw_moe": Kind(WorkspaceSettings, "mome_dist.moe.routers.gw_moe:WorkspaceRouter"),
    "expert_choice": Kind(ExpertChoiceSettings, "mome_dist.moe.routers.expert_choice:ExpertChoiceRouter"),
    "grin": Kind(GrinSettings, "mome_dist.moe.routers.grin:GrinRouter"),
}
