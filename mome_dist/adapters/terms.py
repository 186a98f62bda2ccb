"""Which low-rank terms the LLM's layers have, and which of them a token of a view uses.

The families of models that differ in this: one term for all views (Llama-AVSR, arXiv 2409.12319; Llama-MTSK "MS", arXiv
2503.06362), one for each pair of rates ("SS"), both summed ("MSS"), one for each task (Omni-AVSR "T", arXiv
2511.07253), or that and a shared one ("ST"). No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

SHARED, TASK, RATES = "shared", "task", "rates"


class View(Protocol):
    """What is asked of a view (`mome_dist.speech.views.View`); its text is its name."""

    @property
    def task(self) -> str: ...

    @property
    def audio_rate(self) -> int | None: ...

    @property
    def video_rate(self) -> int | None: ...


def term_name(kind: str, view: View) -> str:
    """The name of a view's term of a kind: "shared", its task such as "asr", or task and rates such as "avsr_4_2"."""
    if kind == SHARED:
        return SHARED
    rates = (str(rate) for rate in (view.audio_rate, view.video_rate) if rate is not None)
    return view.task if kind == TASK else "_".join((view.task, *rates))


@dataclass(frozen=True)
class LowRankTerms:
    """The low-rank terms of the query and value projections, alike in every layer of the LLM.

    Attributes:
        rank: of each.
        scale: that their sum is multiplied by.
        start: "a_random" or "b_random", the factor that does not start at zero.
        kinds: of "shared", "task" and "rates", the terms that are summed for a token.
        views: that a run trains on.
    """

    rank: int
    scale: float
    start: str
    kinds: tuple[str, ...]
    views: tuple[View, ...]

    @property
    def names(self) -> list[str]:
        """Names of all terms, sorted, with the numbers in them by value."""
        return sorted({name for view in self.views for name in self.of(view)}, key=by_number)

    def of(self, view: View) -> list[str]:
        """Names of the terms that tokens of a view use; a view that the run does not train on may name unknown ones."""
        return [term_name(kind, view) for kind in self.kinds]

    def has(self, view: View) -> bool:
        """Whether there are all terms that a view uses."""
        return set(self.of(view)) <= set(self.names)

    def parameters(self, hidden_size: int, query_width: int, value_width: int) -> int:
        """Parameters of all terms of a layer."""
        return len(self.names) * self.rank * (2 * hidden_size + query_width + value_width)


def by_number(name: str) -> list[tuple[int, int | str]]:
    """A key to sort names of terms by, their numbers by value."""
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in name.split("_")]
