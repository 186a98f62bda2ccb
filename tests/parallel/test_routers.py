"""Every router of the registry does what is asked of all, and so does the one that the page on routers adds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mome_dist.errors import UserError
from mome_dist.moe import routers
from mome_dist.moe.routers import registry
from tests import router_conformance as conformance
from tests.contributed import ROUTER, write_config


@pytest.mark.parametrize("check", conformance.ALONE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("form", conformance.ALL.values(), ids=conformance.ALL)
def test_every_router(form: list[str], check: Callable[[list[str]], None]) -> None:
    check(form)


def test_every_dispatch_of_every_router() -> None:
    conformance.every_dispatch_is_the_local_form(list(conformance.ALL.values()))


# What MoME has is what all other tests of layouts and checkpoints are about.
OTHERS = {name: form for name, form in conformance.ALL.items() if name != "top_k"}
# One form of all that save the same tensors: nothing else of a router is in a checkpoint.
SAVED = {conformance.saved(form): name for name, form in reversed(conformance.ALL.items())}
# And of each router one form at least.
FIRST = {name.partition(" ")[0]: name for name in reversed(conformance.ALL)}
TRAINED = [form for name, form in OTHERS.items() if name in SAVED.values() or name in FIRST.values()]


def test_every_router_in_a_model(tmp_path: Path) -> None:
    conformance.layouts_are_one_process(TRAINED, tmp_path)


@pytest.mark.parametrize("name", [name for name in OTHERS if name in SAVED.values()])
def test_checkpoints_of_every_router(name: str, tmp_path: Path) -> None:
    conformance.checkpoints_go_anywhere(OTHERS[name], tmp_path)


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What chooses the router that the page adds, as it says."""
    text, folder = ROUTER, tmp_path_factory.mktemp("added")
    settings, line, module = re.findall(r"```python\n(.*?)```", text, re.S)
    with pytest.MonkeyPatch.context() as patch:
        name = write_config(text, "mome/router", folder, patch)
        assert f"`mome_dist/moe/routers/{name}.py`" in text
        (folder / f"{name}.py").write_text(module)
        patch.setattr(routers, "__path__", [*routers.__path__, str(folder)])
        names = dict(registry.__dict__)
        exec(settings, names)
        patch.setattr(registry, "NucleusSettings", names["NucleusSettings"], raising=False)
        for kind, entry in eval(f"{{{line}}}", names).items():
            patch.setitem(registry.ROUTERS, kind, entry)
        (form,) = conformance.forms(name)
        yield form


@pytest.mark.parametrize("check", conformance.ALONE, ids=lambda check: check.__name__)
def test_the_router_of_the_page(added: list[str], check: Callable[[list[str]], None]) -> None:
    check(added)


def test_the_router_of_the_page_in_every_layout(added: list[str], tmp_path: Path) -> None:
    conformance.every_dispatch_is_the_local_form([added])
    conformance.layouts_are_one_process([added], tmp_path)


def test_checkpoints_of_the_router_of_the_page(added: list[str], tmp_path: Path) -> None:
    conformance.checkpoints_go_anywhere(added, tmp_path)


def test_the_router_of_the_page_refuses_what_it_does_not_have(added: list[str]) -> None:
    for more, message in (
        ("mome.score=sigmoid", r"mome\.score=sigmoid does not go with mome\.router\.name=nucleus: set softmax"),
        ("mome.renormalize=true", r"mome\.renormalize=true does not go with .*: set false"),
        ("mome.router.mass=2", r"mome\.router\.mass=2.*above 0 and at most 1"),
    ):
        with pytest.raises(UserError, match=message):
            conformance.configured(added, more)


def test_tokens_of_the_router_of_the_page_use_unequal_numbers_of_experts(added: list[str]) -> None:
    router = conformance.local_form(added).router
    routing = router(conformance.hidden(40, 1), None)
    assert routing.chosen_TK is not None
    used = routing.chosen_TK.sum(dim=1)
    assert set(used.tolist()) == {1, 2}
    sure = routing.probs_TE.max(dim=1).values >= 0.4
    assert torch.equal(used == 1, sure)
    assert torch.equal(routing.selected_TE().sum(dim=1), used)
    assert torch.equal(routing.gates_TE() > 0, routing.selected_TE())
