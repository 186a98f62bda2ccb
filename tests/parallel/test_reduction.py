"""When gradients are reduced: once a step, after its last backward pass, whatever DeepSpeed is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from mome_dist.config.schema import OptimizerConfig
from mome_dist.engine.engine import Engine
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from tests.parallel.replicated import Replicated
from tests.parallel.worlds import run_world

pytestmark = pytest.mark.parallel
WIDTH, PASSES = 6, 3


def _numbers_sent(all_settings: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Numbers that each setting reduces during the backward passes of a step, and at their end."""
    sent, found = [0], []
    own = dist.all_reduce, dist.reduce

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sent[0] += tensor.numel()
            return function(tensor, *args, **kwargs)

        return call

    with parallel_world(Layout.for_world(2), 0, timeout_seconds=60):
        for settings in all_settings:
            linear = torch.nn.Linear(WIDTH, WIDTH, bias=False)
            engine = Engine(Replicated(torch.nn.ModuleDict({"projectors": linear})), OptimizerConfig(), settings)
            dist.all_reduce, dist.reduce = (counting(function) for function in own)
            sent[0] = 0
            with engine.accumulate():
                for number in range(PASSES):
                    linear(torch.full((1, WIDTH), 10.0**number * int(os.environ["RANK"]))).sum().backward()
                during = sent[0]
            found.append((during, sent[0]))
            dist.all_reduce, dist.reduce = own
            assert engine.gradient(cast(torch.nn.Parameter, linear.weight)).eq(111 / 2).all()
    return found


def test_every_gradient_travels_once_a_step_after_its_last_backward_pass() -> None:
    stages: list[dict[str, Any]] = [{"stage": 0}]
    stages += [{"stage": stage, "overlap_comm": beside} for stage in (1, 2) for beside in (False, True)]
    settings = [{"zero_optimization": zero} for zero in stages]
    assert run_world(_numbers_sent, 2, settings) == [[(0, WIDTH * WIDTH)] * len(settings)] * 2
