"""Every router of the registry does what is asked of all; and what is special to those that are separate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import router_conformance as conformance


@pytest.mark.parametrize("check", conformance.ALONE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("form", conformance.ALL.values(), ids=conformance.ALL)
def test_every_router(form: list[str], check: Callable[[list[str]], None]) -> None:
    check(form)


# What MoME has is what all other tests of layouts and checkpoints are about.
OTHERS = {name: form for name, form in conformance.ALL.items() if name != "top_k"}


@pytest.mark.parametrize("check", conformance.WHOLE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("form", OTHERS.values(), ids=OTHERS)
def test_every_router_in_a_model(form: list[str], check: Callable[[list[str], Path], None], tmp_path: Path) -> None:
    check(form, tmp_path)
