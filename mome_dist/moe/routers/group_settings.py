"""Settings of routers that ask which group a token is of: its rates, task or modality. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mome_dist.adapters.terms import RATES, TASK, View, by_number, term_name
from mome_dist.moe.routers.spec import RouterSettings, negative

MODALITIES = ("text", "audio", "video")
"""In the order of `mome_dist.token_context.Modality`."""


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

    reroutes = True

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.outputs(experts, views) * hidden_size

    def outputs(self, experts: int, views: Sequence[View]) -> int:
        return len(self.groups(views)) * experts

    def __str__(self) -> str:
        return f"one router for each {'pair of rates' if self.by == 'rate' else self.by}"


@dataclass(frozen=True)
class HashSettings(GroupedSettings):
    """Settings of `mome_dist.moe.routers.hashed.HashRouter`."""

    learns = False
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

    def choices(self, experts: int, views: Sequence[View]) -> int:
        return self.visible or experts // len(self.groups(views))

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

    reroutes = True
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

    reroutes = True
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
class ConditionSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.condition.ConditionRouter`.

    Attributes:
        by: what shifts a token's scores beside its hidden state.
        width: D of an embedding.
        sparsity_loss, importance_loss: coefficients.
    """

    reroutes = True
    scores = ("softmax",)
    by: list[str] = field(
        default_factory=lambda: ["rate"], metadata={"choices": ("rate", "task", "modality", "utterance")}
    )
    width: int = 16
    sparsity_loss: float = 0.0
    importance_loss: float = 0.0

    @property
    def embedded(self) -> dict[str, GroupedSettings]:
        """What makes the groups that have embeddings, by name, in order."""
        return {by: GroupedSettings(by) for by in sorted(set(self.by) - {"utterance"})}

    @property
    def of_utterance(self) -> bool:
        return "utterance" in self.by

    def problem(self, experts: int, top_k: int) -> str | None:
        if not self.by or len(set(self.by)) < len(self.by):
            return f"by={self.by}: name at least one of rate, task, modality, utterance, and none twice."
        if self.width < 1:
            return f"width={self.width}: set 1 or more."
        return negative("sparsity_loss", self.sparsity_loss) or negative("importance_loss", self.importance_loss)

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        groups = sum(len(each.groups(views)) for each in self.embedded.values())
        return self._maps(hidden_size, experts) + groups * self.width

    def active_parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self._maps(hidden_size, experts) + len(self.embedded) * self.width

    def _maps(self, hidden_size: int, experts: int) -> int:
        return self.outputs(experts, ()) * hidden_size + len(self.embedded) * experts * self.width

    def outputs(self, experts: int, views: Sequence[View]) -> int:
        return experts * (2 if self.of_utterance else 1)

    def covers(self, view: View, views: Sequence[View]) -> bool:
        return all(each.covers(view, views) for each in self.embedded.values())

    def __str__(self) -> str:
        return f"scores shifted by {', '.join(self.by)}"
