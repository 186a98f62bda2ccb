"""The compiled extension of Apex's norms; here it keeps what was called."""

from __future__ import annotations

CALLS: list[str] = []
