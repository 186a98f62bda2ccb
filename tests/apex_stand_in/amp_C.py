"""The compiled extension of Apex's optimisers; here it keeps what was called."""

from __future__ import annotations

from typing import Any

CALLS: list[tuple[str, Any]] = []
