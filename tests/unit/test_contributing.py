"""What CONTRIBUTING.md says to write works as it stands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mome_dist.adapters.terms import SHARED, TASK
from mome_dist.commands import verify as verify_layouts
from mome_dist.config import load_config
from mome_dist.config.values import check_values
from mome_dist.moe.forms.registry import find_form
from tests.contributed import PAGE, add_form, section, write_config
from tests.unit import test_expert_forms as of_forms


def test_a_method_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_config(section("Add a method"), "method", tmp_path, monkeypatch)
    config = load_config(["experiment=tiny", f"method={name}"])
    check_values(config)
    assert config.llm.lora is not None and config.llm.lora.terms == [SHARED, TASK] and not config.mome.experts
    assert (config.task.weights.asr, config.task.weights.vsr) == (1, 2) and config.task.tasks == ["asr", "vsr", "avsr"]


@pytest.fixture
def form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield add_form(tmp_path, monkeypatch)
    find_form.cache_clear()


def test_an_expert_form_is_one_file_a_line_and_a_group_file(form: str) -> None:
    config = load_config(["experiment=tiny", f"mome={form}"])
    check_values(config)
    assert config.mome.expert == form and config.mome.routed_experts == 24


# What the registry's tests ask of every form.
EVERY: list[tuple[Callable[..., None], dict[str, Any]]] = [
    (check, {})
    for check in (
        of_forms.test_it_starts_as_nothing_with_a_gradient_for_what_is_zero_alone,
        of_forms.test_shared_experts_have_a_gate_of_one,
        of_forms.test_ranks_without_rows_have_gradients_of_zero,
        of_forms.test_in_evaluation_more_rows_change_no_bit,
        of_forms.test_it_has_as_many_parameters_as_everybody_counts,
    )
]
EVERY += [(of_forms.test_dense_equals_ragged_equals_one_at_a_time, {"training": on}) for on in (True, False)]
EVERY += [(of_forms.test_neighbours_change_no_bit, {"training": on}) for on in (True, False)]
EVERY += [(of_forms.test_what_decodes_is_what_trains, {"shared": 1})]
EVERY += [(of_forms.test_autograd_keeps_what_the_planner_counts, {"dtype": torch.bfloat16})]


@pytest.mark.parametrize(("check", "more"), EVERY)
def test_what_every_form_must_do_the_example_does(form: str, check: Callable[..., None], more: dict[str, Any]) -> None:
    check(form, **more)


def test_its_command_is_understood() -> None:
    (command,) = re.findall(r"^mome-dist verify (.*)$", PAGE, re.M)
    options = verify_layouts.command_line().parse_intermixed_args(shlex.split(command))
    check_values(load_config(options.overrides))
