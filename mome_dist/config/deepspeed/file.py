"""A user's DeepSpeed JSON file: read, checked against `mome_dist.config.deepspeed.keys`, reduced to what acts.

DeepSpeed is never given the file itself. It is told the settings that the table lets through, so whatever else a file
says is either without effect or refused, everything in one message. No torch here: a launcher runs this first.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mome_dist.config.deepspeed.keys import KEYS, ZERO
from mome_dist.config.deepspeed.rules import UNKNOWN, Acts, Agrees, Only, Refused, Rule, Section, Switched
from mome_dist.config.load import resolve_deepspeed_file
from mome_dist.config.schema import RunConfig
from mome_dist.errors import UserError, no_file
from mome_dist.files import write_json, write_text
from mome_dist.paths import configs_dir
from mome_dist.text_files import lines_of

AUTO = "auto"  # Hugging Face's word for the value of the program; here for that of the project


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What a file comes to.

    Attributes:
        acts: what DeepSpeed is told, as a DeepSpeed configuration; it always has a ZeRO stage.
        without_effect: names of the file's other settings.
    """

    acts: dict[str, Any]
    without_effect: tuple[str, ...]

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.acts["zero_optimization"]["stage"])

    def describe(self) -> str:
        """One line for the start of a run."""
        zero = dict(self.acts["zero_optimization"])
        words = [f"ZeRO {zero.pop('stage')}", *(f"{key}={json.dumps(value)}" for key, value in zero.items())]
        rest = f"; without effect here: {', '.join(self.without_effect)}" if self.without_effect else ""
        return f"DeepSpeed: {', '.join(words)}{rest}"


def deepspeed_of(config: RunConfig, data_parallel: int | None = None) -> DeepSpeedSettings:
    """What the file of a run tells DeepSpeed.

    Args:
        data_parallel: ranks that share a batch; None if they are not known yet.

    Raises:
        UserError: naming everything in the file that cannot be, and what to do about each.
    """
    path = resolve_deepspeed_file(config)
    if not path.is_file():
        raise UserError(
            f"deepspeed.file={config.deepspeed.file!r}: {path} {no_file(path)}; choose deepspeed=zero0, "
            "deepspeed=zero1 or deepspeed=zero2, or name a DeepSpeed file of your own."
        )
    twice: list[str] = []
    try:
        settings = json.loads(
            "\n".join(lines_of(path)),
            object_pairs_hook=lambda pairs: _once(pairs, twice),
            parse_constant=_no_number,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.file: {path} is not JSON ({error}).") from error
    return settled(settings, config, data_parallel, f"deepspeed.file: {path}", twice)


def settled(
    settings: Any, config: RunConfig, data_parallel: int | None, origin: str, twice: Iterable[str] = ()
) -> DeepSpeedSettings:
    """Check a DeepSpeed configuration and reduce it to what acts.

    Args:
        settings: as JSON has it.
        data_parallel: as for `deepspeed_of`.
        origin: begins the message.
        twice: keys that an object of the file has twice.

    Raises:
        UserError: as for `deepspeed_of`.
    """
    if not isinstance(settings, Mapping):
        raise UserError(f'{origin} holds {_shape(settings)}; give an object: {{"zero_optimization": {{"stage": 1}}}}.')
    zero: dict[str, Any] = {"stage": 0}
    without_effect: list[str] = []
    clashes = [f"'{key}': is there twice, and DeepSpeed would take the last one" for key in twice]
    for finding in _walk(settings, KEYS, "", config, data_parallel):
        if finding.clash:
            clashes.append(f"'{finding.key}'{_said(finding.value)}: {finding.clash}")
        elif finding.acts:
            zero[finding.key.removeprefix("zero_optimization.")] = finding.value
        else:
            without_effect.append(finding.key)
    if clashes:
        count = "one setting" if len(clashes) == 1 else f"{len(clashes)} settings"
        raise UserError(f"{origin} has {count} to change: {'; '.join(clashes)}.")
    if zero["stage"] == 0:  # nothing else of ZeRO does anything then
        without_effect += [f"zero_optimization.{key}" for key in zero if key != "stage"]
        zero = {"stage": 0}
    return DeepSpeedSettings({"zero_optimization": zero}, tuple(without_effect))


def write_deepspeed(settings: Mapping[str, Any], path: Path) -> str:
    """Write a DeepSpeed configuration as a JSON file, in ``configs/deepspeed`` also as an option of that name.

    Returns:
        The override with which a run uses it.
    """
    write_json(path, settings)
    if path.resolve().parent != (configs_dir() / "deepspeed").resolve():
        return f"deepspeed.file={path}"
    lines = ("# DeepSpeed settings that a command wrote.", f"file: {path.name}  # the JSON file beside this one", "")
    write_text(path.with_suffix(".yaml"), "\n".join(lines))
    return f"deepspeed={path.stem}"


@dataclass(frozen=True)
class _Finding:
    """A setting of a file: whether it acts, or what to do about it; neither for one without effect."""

    key: str
    value: Any = None
    acts: bool = False
    clash: str = ""


def _walk(
    settings: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str, config: RunConfig, data_parallel: int | None
) -> Iterator[_Finding]:
    for name, value in settings.items():
        key, rule = prefix + name, rules.get(name)
        if rule is None:
            yield _Finding(key, value, clash=_unknown(name, rules))
        elif isinstance(rule, Section):
            yield from _section(key, value, rule, config, data_parallel)
        elif isinstance(rule, Acts):
            yield _acting(key, value, rule)
        elif value == AUTO:
            yield _Finding(key)
        elif isinstance(rule, Agrees):
            yield _Finding(key, value, clash=_disagreement(value, rule, config, data_parallel))
        elif isinstance(rule, Only):
            yield _Finding(key, value, clash="" if _among(value, rule.values) else rule.instead)
        else:
            yield _Finding(key, value, clash=rule.instead if isinstance(rule, Refused) else "")


def _section(key: str, value: Any, rule: Section, config: RunConfig, data_parallel: int | None) -> Iterator[_Finding]:
    if value is None or (value is False and key == "zero_optimization"):  # the old form, of which true is ZeRO 1
        yield _Finding(key)
    elif not isinstance(value, Mapping):
        example = '; for ZeRO 1 write {"stage": 1}' if key == "zero_optimization" else ""
        yield _Finding(key, value, clash=f"must be an object of settings{example}")
    elif isinstance(rule, Switched) and not _among(value.get(rule.switch), (*rule.off, AUTO)):
        yield _Finding(key, value, clash=rule.instead)
    elif isinstance(rule, Switched):
        unknown = [name for name in value if rule.keys is not None and name not in rule.keys]
        yield from (_Finding(f"{key}.{name}", value[name], clash=_unknown(name, rule.keys or {})) for name in unknown)
        yield _Finding(key)
    else:
        yield from _walk(value, rule.keys or {}, f"{key}.", config, data_parallel)


def _among(value: Any, values: Iterable[Any]) -> bool:
    """Whether a value is one of some; in Python, 1 is True."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)


def _acting(key: str, value: Any, rule: Acts) -> _Finding:
    if value == AUTO:
        return _Finding(key) if rule.own is None else _Finding(key, rule.own, acts=True)
    if not rule.valid(value):
        return _Finding(key, value, clash=f"must be {rule.values}")
    return _Finding(key, int(value) if isinstance(value, float) else value, acts=True)


def _disagreement(value: Any, rule: Agrees, config: RunConfig, data_parallel: int | None) -> str:
    own = rule.value(config, data_parallel)
    if own is UNKNOWN or (own is not None and rule.same(value, own)):
        return ""
    return f"{rule.key} decides, and is {json.dumps(own)}: change that, or remove it here"


def _unknown(name: str, rules: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, rules, n=1, cutoff=0.7)
    if near:
        return f"is no key of DeepSpeed's (did you mean {near[0]}?)"
    return "belongs into zero_optimization" if name in ZERO else "is no key of DeepSpeed's: remove it"


def _once(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    """The object of these pairs; keys that come again are added to ``twice``."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            twice.append(key)
        made[key] = value
    return made


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON's")


def _shape(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _said(value: Any) -> str:
    """A short value, to be recognised by."""
    text = json.dumps(value)
    return f" ({text})" if len(text) <= 40 and not isinstance(value, Mapping) else ""
