"""The kinds of rules for a key of a DeepSpeed configuration (`mome_dist.config.deepspeed.keys` has the keys)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mome_dist.config.schema import RunConfig

ANY: Mapping[str, Any] | None = None  # keys of a section that nobody looks into
UNKNOWN = object()  # a quantity that depends on a layout that is not known yet


@dataclass(frozen=True)
class Acts:
    """A key that DeepSpeed is told.

    Attributes:
        what: it does.
        valid: whether DeepSpeed takes a value.
        values: which those are, in words.
        own: what "auto" stands for; None for DeepSpeed's own default.
    """

    what: str
    valid: Callable[[Any], bool]
    values: str
    own: Any = None


@dataclass(frozen=True)
class Agrees:
    """A key that the project's configuration decides; a file may say the same.

    Attributes:
        key: of the configuration.
        value: the same quantity there; None where the configuration has none, `UNKNOWN` where it cannot be told. Its
            second argument is the number of data-parallel ranks, None if that is not known.
        names: what a file may call a value of the configuration, if not the same.
    """

    key: str
    value: Callable[[RunConfig, int | None], Any]
    names: Mapping[str, Sequence[str]] | None = None

    def same(self, given: Any, own: Any) -> bool:
        """Whether a value of a file is that of the configuration."""
        return given == own if self.names is None else str(given).lower() in self.names[own]


@dataclass(frozen=True)
class Harmless:
    """A key that changes nothing, whatever its value; ``why`` completes "is harmless: "."""

    why: str


@dataclass(frozen=True)
class Only:
    """A key of which only values that change nothing are accepted.

    Attributes:
        values: that are.
        instead: what to do about any other one.
    """

    values: Sequence[Any]
    instead: str


@dataclass(frozen=True)
class Refused:
    """A key that is never accepted; ``instead`` is what to do about it."""

    instead: str


@dataclass(frozen=True)
class Section:
    """An object of keys.

    Attributes:
        keys: by name; `ANY` if they do not matter.
    """

    keys: Mapping[str, Any] | None


@dataclass(frozen=True)
class Switched(Section):
    """A section that must not be switched on.

    Attributes:
        instead: what to do about one that is.
        switch: the key that says so.
        off: its values with which the section does nothing; None is a missing one.
    """

    instead: str
    switch: str = "enabled"
    off: tuple[Any, ...] = (False, None)


Rule = Acts | Agrees | Harmless | Only | Refused | Section  # a Switched is a Section
