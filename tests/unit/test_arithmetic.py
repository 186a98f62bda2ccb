"""Closed forms against the published figures and against the modules themselves."""

from __future__ import annotations

import pytest
import torch

from mome_dist.evaluation.arithmetic import active_and_total_parameters, lora_parameters
from mome_dist.moe.forms.registry import find_form
from mome_dist.moe.local import LocalMoME

LLAMA_3B = (3072, 28)  # hidden size, layers


def test_published_counts_at_llama_3b() -> None:
    count = active_and_total_parameters(*LLAMA_3B, routed_experts=23, top_k=4, shared_experts=1, bottleneck=12)
    assert count.active == 12_732_048
    assert count.total == 53_596_032
    assert lora_parameters(*LLAMA_3B, query_width=3072, value_width=1024, rank=96) == 27_525_120


@pytest.mark.parametrize(
    ("hidden", "layers", "routed", "top_k", "shared", "bottleneck"), [(3072, 28, 23, 4, 1, 12), (576, 30, 24, 2, 0, 1)]
)
def test_closed_form_counts_the_real_modules(
    hidden: int, layers: int, routed: int, top_k: int, shared: int, bottleneck: int
) -> None:
    with torch.device("meta"):
        modules = [LocalMoME(hidden, routed, top_k, shared, bottleneck) for _ in range(layers)]
    total = sum(parameter.numel() for module in modules for parameter in module.parameters())
    # A token leaves out the routed experts that it did not choose.
    idle = sum((routed - top_k) * parameter[0].numel() for m in modules for parameter in m.routed.parameters())
    assert active_and_total_parameters(hidden, layers, routed, top_k, shared, bottleneck) == (total - idle, total)


def test_one_expert_is_two_linear_maps_with_biases() -> None:
    linears = [torch.nn.Linear(7, 3), torch.nn.Linear(3, 7)]
    assert find_form("bottleneck").parameters(7, 3) == sum(p.numel() for linear in linears for p in linear.parameters())
