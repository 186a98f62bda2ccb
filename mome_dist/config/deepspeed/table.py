"""`mome_dist.config.deepspeed.keys` as a Markdown table: ``python -m mome_dist.config.deepspeed.table``.

It is the table of docs/deepspeed.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mome_dist.config.deepspeed.keys import KEYS
from mome_dist.config.deepspeed.rules import Acts, Agrees, Harmless, Only, Refused, Rule, Section, Switched


def rows(rules: Mapping[str, Rule] = KEYS, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, what becomes of it ("acts", "agrees", "harmless", "refused"), and the rest of the story."""
    for name, rule in rules.items():
        key = prefix + name
        if isinstance(rule, Acts):
            own = "" if rule.own is None else f'; "auto" is {json.dumps(rule.own)}'
            yield key, "acts", f"{rule.what}: {rule.values}{own}"
        elif isinstance(rule, Agrees):
            yield key, "agrees", f"must be `{rule.key}`, or be left out"
        elif isinstance(rule, Harmless):
            yield key, "harmless", rule.why
        elif isinstance(rule, Only):
            yield key, "refused", f"unless it is {_listed(rule.values)}: {rule.instead}"
        elif isinstance(rule, Refused):
            yield key, "refused", rule.instead
        elif isinstance(rule, Switched):
            off = [value for value in rule.off if value is not None]
            yield f"{key}.*", "refused", f"unless `{rule.switch}` is {_listed(off)} or missing: {rule.instead}"
        elif isinstance(rule, Section):
            yield from rows(rule.keys or {}, f"{key}.")


def _listed(values: Any) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in values)


def table() -> str:
    """All rows in Markdown."""
    lines = ["| key | here | |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{key}` | {state} | {story} |" for key, state, story in rows())])


if __name__ == "__main__":
    print(table())
