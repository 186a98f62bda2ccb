"""Parameter counts in closed form.

Sources: MoME (arXiv 2510.04136), Llama-AVSR (arXiv 2409.12319). The published figures come out: at Llama 3.2-3B
(H 3072, 28 layers, key-value width 1024) MoME-23/4 has 12.7 million active parameters, and LoRA of rank 96 on Q and V
has 27.5 million.
"""

from __future__ import annotations

from typing import NamedTuple

from mome_dist.config.derived import llm_terms_of, router_of, widths_of
from mome_dist.config.schema import RunConfig
from mome_dist.llm.shape import LLMShape
from mome_dist.moe.forms.registry import DEFAULT, find_form
from mome_dist.moe.routers.spec import PLAIN, RouterSpec
from mome_dist.moe.widths import Widths


class ParameterCount(NamedTuple):
    """Parameters that one token passes through, and all parameters that are kept and trained."""

    active: int
    total: int


def active_and_total_parameters(
    hidden_size: int,
    layers: int,
    routed_experts: int,
    top_k: int,
    shared_experts: int,
    bottleneck: int,
    router: RouterSpec = PLAIN,
    expert_form: str = DEFAULT,
    widths: Widths | None = None,
) -> ParameterCount:
    """Parameters of the MoME modules of a model, routers included.

    Args:
        hidden_size, routed_experts, top_k, shared_experts, bottleneck: H, Nr, K, Ns, b of the paper; no routed experts
            and none a token without a router.
        layers: LLM layers; each has one module.
        router: of every module that has routed experts.
        expert_form: name of the experts' form.
        widths: units of each expert where they differ: then the active ones are those of a mean expert, and units that
            an expert lacks are in no count.
    """
    form = find_form(expert_form)
    common = form.common_parameters(hidden_size, bottleneck)
    shared = shared_experts * form.parameters(hidden_size, bottleneck)
    units = (bottleneck,) * routed_experts if widths is None else widths.routed
    chosen = min(top_k * router.settings.passes, routed_experts)
    routed = sum(form.parameters(hidden_size, width) for width in units)
    used = router.active_parameters(hidden_size, routed_experts) if routed_experts else 0
    held = router.parameters(hidden_size, routed_experts) if routed_experts else 0
    return ParameterCount(
        active=layers * (round(chosen * routed / max(routed_experts, 1)) + shared + common + used),
        total=layers * (routed + shared + common + held),
    )


def mome_parameters(config: RunConfig, hidden_size: int, layers: int) -> ParameterCount:
    """Parameters of the MoME modules of a configuration; none in a run without experts."""
    mome = config.mome
    if not mome.placed:
        return ParameterCount(0, 0)
    sizes = (mome.experts, mome.top_k if mome.experts else 0, mome.shared_experts, mome.bottleneck)
    return active_and_total_parameters(hidden_size, layers, *sizes, router_of(config), mome.expert, widths_of(config))


def lora_parameters(hidden_size: int, layers: int, query_width: int, value_width: int, rank: int) -> int:
    """Parameters of rank-``rank`` LoRA on the query and value projections of every layer.

    Args:
        query_width: heads times head size (the hidden size in most Llamas).
        value_width: key-value heads times head size.
    """
    return layers * rank * ((hidden_size + query_width) + (hidden_size + value_width))


def llm_lora_parameters(config: RunConfig, shape: LLMShape) -> ParameterCount:
    """Parameters of the low-rank terms of a run's LLM; none in a run without."""
    terms = llm_terms_of(config, shape.hidden_size)
    if terms is None:
        return ParameterCount(0, 0)
    heads, kv_heads = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    one = lora_parameters(shape.hidden_size, shape.layers, heads, kv_heads, terms.rank)
    return ParameterCount(active=len(terms.kinds) * one, total=len(terms.names) * one)
