"""All kinds of routers by name: their settings, and where their code is. No torch here.

``mome.router.name`` names one. docs/tutorials/own-router.md says how to add another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mome_dist.adapters.terms import RATES, TASK, View, by_number, term_name
from mome_dist.moe.routers.spec import RouterSettings

MODALITIES = ("text", "audio", "video")
"""In the order of `mome_dist.token_context.Modality`."""


@dataclass(frozen=True)
class SeparateSettings(RouterSettings):
    """Settings of `mome_dist.moe.routers.separate.SeparateRouter`.

    Attributes:
        by: what tokens with a router of their own have in common: the rates of their view, its task, or their modality.
    """

    by: str = field(default="rate", metadata={"choices": ("rate", "task", "modality")})

    def group_of(self, view: View) -> str:
        """The group that all tokens of a view are of; not by modality."""
        return term_name(TASK if self.by == "task" else RATES, view)

    def groups(self, views: Sequence[View]) -> tuple[str, ...]:
        """Names of the groups of a run in the order in which their matrices lie: views' rates such as "avsr_4_2",
        tasks, or modalities. Text (words, prompt, and the tags around speech) is a modality of its own."""
        if self.by != "modality":
            return tuple(sorted({self.group_of(view) for view in views}, key=by_number))
        heard = any(view.audio_rate is not None for view in views)
        seen = any(view.video_rate is not None for view in views)
        return (*(["audio"] if heard else []), "text", *(["video"] if seen else []))

    def parameters(self, hidden_size: int, experts: int, views: Sequence[View]) -> int:
        return self.outputs(experts, views) * hidden_size

    def outputs(self, experts: int, views: Sequence[View]) -> int:
        return len(self.groups(views)) * experts

    def covers(self, view: View, views: Sequence[View]) -> bool:
        return self.by == "modality" or self.group_of(view) in self.groups(views)

    def __str__(self) -> str:
        return f"one router for each {'pair of rates' if self.by == 'rate' else self.by}"


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
}
