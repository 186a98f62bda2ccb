"""All kinds of routers by name: their settings, and where their code is. No torch here.

``mome.router.name`` names one. docs/tutorials/own-router.md says how to add another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mome_dist.adapters.terms import RATES, TASK, View, by_number, term_name
from mome_dist.moe.routers.spec import RouterSettings

MODALITIES = ("text", "audio", "video")
"""In the order of `mome_dist.token_context.Modality`."""


def negative(key: str, value: float) -> str | None:
    """What is wrong with a number below zero, as `RouterSettings.problem` says it."""
    return f"{key}={value}: set 0 or more." if not 0 <= value < math.inf else None


@dataclass(frozen=True)
class GroupedSettings(RouterSettings):
    """What settings of routers have that know groups of tokens (`mome_dist.moe.routers.token_groups.TokenGroups`).

    Attributes:
        by: what the tokens of a group have in common: the rates of their view, its task, or their modality.
    """

    by: str = field(default="rate", metadata={"choices": ("rate", "task", "modality")})

    def group_of(self, view: View) -> str:
        """The group that all tokens of a view are of; not by modality."""
        return term_name(TASK if self.by == "task" else RATES, view)

    def groups(self, views: Sequence[View]) -> tuple[str, ...]:
        """Names of the groups of a run, in order: views' rates such as "avsr_4_2", tasks, or modalities. Text (words,
        prompt, and the tags around speech) is a modality of its own."""
        if self.by != "modality":
            return tuple(sorted({self.group_of(view) for view in views}, key=by_number))
        heard = any(view.audio_rate is not None for view in views)
        seen = any(view.video_rate is not None for view in views)
        return (*(["audio"] if heard else []), "text", *(["video"] if seen else []))

    def covers(self, view: View, views: Sequence[View]) -> bool:
        return self.by == "modality" or self.group_of(view) in self.groups(views)


@dataclass(frozen=True)
class SeparateSettings(GroupedSettings):
    """Settings of `mome_dist.moe.routers.separate.SeparateRouter`: a group of tokens has a router of its own."""

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.outputs(experts, views) * hidden_size

    def outputs(self, experts: int, views: Sequence[View]) -> int:
        return len(self.groups(views)) * experts

    def __str__(self) -> str:
        return f"one router for each {'pair of rates' if self.by == 'rate' else self.by}"


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
    """Settings of `mome_dist.moe.routers.random.RandomRouter`."""

    scores = ("softmax",)
    renormalizes = (True,)

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return 0

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return 0

    def __str__(self) -> str:
        return "random experts"


@dataclass(frozen=True)
class HashSettings(GroupedSettings):
    """Settings of `mome_dist.moe.routers.hashed.HashRouter`."""

    scores = ("softmax",)
    renormalizes = (True,)
    takes_bias = False

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return 0

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return 0

    def outputs(self, experts: int, views: Sequence[View]) -> int:
        return 0

    def __str__(self) -> str:
        return f"experts by {self.by}, nothing learned"


@dataclass(frozen=True)
class GroupsSettings(GroupedSettings):
    """Settings of `mome_dist.moe.routers.groups.GroupsRouter`.

    Attributes:
        by: as in `GroupedSettings`.
        visible: experts that each group sees; None shares them out, so that none is seen by two groups.
    """

    takes_bias = False
    by: str = field(default="modality", metadata={"choices": ("modality", "rate", "task")})
    visible: int | None = None

    def problem(self, experts: int, top_k: int) -> str | None:
        if self.visible is not None and not 0 < self.visible <= experts:
            return f"visible={self.visible}: set 1 to mome.routed_experts={experts}, or null."
        return None

    def __str__(self) -> str:
        of = "experts of its own" if self.visible is None else f"{self.visible} experts"
        return f"each {'pair of rates' if self.by == 'rate' else self.by} with {of}"


@dataclass(frozen=True)
class LimoeSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.limoe.LimoeRouter`.

    Attributes:
        local_loss: coefficient of the mean entropy of a token's probabilities, of each modality.
        global_loss: coefficient of what the entropy of a modality's mean probabilities lacks.
        least_experts: S, whose even use is enough; None for K.
    """

    scores = ("softmax",)
    local_loss: float = 0.04
    global_loss: float = 0.04
    least_experts: int | None = None

    def problem(self, experts: int, top_k: int) -> str | None:
        if self.least_experts is not None and not 0 < self.least_experts <= experts:
            return f"least_experts={self.least_experts}: set 1 to mome.routed_experts={experts}, or null."
        return negative("local_loss", self.local_loss) or negative("global_loss", self.global_loss)

    def __str__(self) -> str:
        return f"entropy losses by modality, local {self.local_loss:g} and global {self.global_loss:g}"


@dataclass(frozen=True)
class SmarSettings(GroupedSettings):
    """Settings of `mome_dist.moe.routers.smar.SmarRouter`.

    Attributes:
        loss: coefficient.
        least, most: symmetric KL divergence between groups, in nats, outside of which there is a loss.
    """

    scores = ("softmax",)
    by: str = field(default="modality", metadata={"choices": ("modality", "rate", "task")})
    loss: float = 0.01
    least: float = 0.1
    most: float = 1.0

    def problem(self, experts: int, top_k: int) -> str | None:
        if not 0 <= self.least <= self.most:
            return f"least={self.least}: set 0 to most={self.most}."
        return negative("loss", self.loss)

    def covers(self, view: View, views: Sequence[View]) -> bool:
        return True

    def __str__(self) -> str:
        of = "pairs of rates" if self.by == "rate" else "tasks" if self.by == "task" else "modalities"
        return f"{of} {self.least:g} to {self.most:g} nats apart"


@dataclass(frozen=True)
class AutonomySettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.autonomy.AutonomyRouter`."""

    scores = ("softmax",)
    dispatches = ("local",)
    reads_experts = True

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return 0

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return 0

    def __str__(self) -> str:
        return "experts by how strongly they answer"


@dataclass(frozen=True)
class ChainSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.chain.ChainRouter`.

    Attributes:
        iterations: C, passes through the experts.
    """

    iterations: int = 2

    @property
    def passes(self) -> int:
        return self.iterations

    def problem(self, experts: int, top_k: int) -> str | None:
        return f"iterations={self.iterations}: set 1 or more." if self.iterations < 1 else None

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.outputs(experts, views) * hidden_size

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.outputs(experts, views) * hidden_size

    def outputs(self, experts: int, views: Sequence[View]) -> int:
        return self.iterations * experts

    def __str__(self) -> str:
        return f"{self.iterations} passes through the experts"


class Kind(NamedTuple):
    """A kind of router.

    Attributes:
        settings: the class of its settings.
        router: ``module:class`` of its code.
    """

    settings: type[RouterSettings]
    router: str


ROUTERS: dict[str, Kind] = {
    "top_k": Kind(RouterSettings, "mome_dist.moe.routers.top_k:TopKRouter"),
    "separate": Kind(SeparateSettings, "mome_dist.moe.routers.separate:SeparateRouter"),
    "top_p": Kind(TopPSettings, "mome_dist.moe.routers.top_p:TopPRouter"),
    "null_experts": Kind(NullSettings, "mome_dist.moe.routers.null_experts:NullRouter"),
    "cosine": Kind(CosineSettings, "mome_dist.moe.routers.cosine:CosineRouter"),
    "chain": Kind(ChainSettings, "mome_dist.moe.routers.chain:ChainRouter"),
    "random": Kind(RandomSettings, "mome_dist.moe.routers.random:RandomRouter"),
    "hash": Kind(HashSettings, "mome_dist.moe.routers.hashed:HashRouter"),
    "groups": Kind(GroupsSettings, "mome_dist.moe.routers.groups:GroupsRouter"),
    "limoe": Kind(LimoeSettings, "mome_dist.moe.routers.limoe:LimoeRouter"),
    "autonomy": Kind(AutonomySettings, "mome_dist.moe.routers.autonomy:AutonomyRouter"),
    "smar": Kind(SmarSettings, "mome_dist.moe.routers.smar:SmarRouter"),
}
