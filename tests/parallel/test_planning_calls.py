"""The operations that MoME modules and low-rank terms call, counted where they run, against the planner's constants."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.operations import Operations
from mome_dist.adapters.tensor_parallel import TensorParallelLoRA, TermsOfTokens
from mome_dist.adapters.terms import LowRankTerms
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.load import PassLoad
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.planning.experts import DENSE_CALLS, ROW_CALLS
from mome_dist.planning.flops import TRAINED
from mome_dist.planning.speed import LOW_RANK_CALLS, LOW_RANK_TENSORS
from mome_dist.speech.views import View
from mome_dist.token_context import TokenContext
from tests.packed import one_view
from tests.parallel.worlds import run_world

pytestmark = pytest.mark.parallel
TOKENS = 256


def _calls(dispatch: str, experts: int) -> int:
    """Calls of a forward and backward pass with the balance loss, in bf16."""
    layer = ExpertParallelMoME(64, experts, 4, 1, 12, ep_size=torch.distributed.get_world_size(), dispatch=dispatch)
    layer.set_deepspeed_parallelism()
    layer.initialize("counted", 0)
    torch.manual_seed(0)
    hidden_TH = torch.randn(256, 64, dtype=torch.bfloat16).requires_grad_()
    context = one_view(len(hidden_TH))
    load = PassLoad(context.view_names, None)
    with Operations() as forward:
        layer.train().prefetch(hidden_TH.dtype)
        output_TH = layer(hidden_TH, context, load)
    load.reduce()  # once for all layers of a pass
    with Operations() as backward:
        output_TH.backward(torch.ones_like(output_TH))
    return forward.count + backward.count


def _counts(world: int, weights: str) -> dict[str, list[int]]:
    with parallel_world(Layout.for_world(world, ep=world), 0, timeout_seconds=60):
        return {dispatch: [_calls(dispatch, n) for n in (8, 24, 48)] for dispatch in (weights, "alltoall")}


@pytest.mark.parametrize(("world", "weights"), [(1, "local"), (2, "gather")])
def test_experts_are_called_together_whatever_their_number(world: int, weights: str) -> None:
    for counts in run_world(_counts, world, world, weights):
        for dispatch, planned in ((weights, DENSE_CALLS), ("alltoall", ROW_CALLS)):
            assert len(set(counts[dispatch])) == 1, "a call for each expert"
            assert counts[dispatch][0] == pytest.approx(planned, rel=0.13)


@dataclass(frozen=True)
class TermCounts:
    """What a forward and backward pass in bf16 asks for, where it adds to the gradients of one before."""

    calls: int
    flops: int
    tensors: int


def _term_counts(world: int, sequence_parallel: bool) -> list[TermCounts]:
    """Count one term, and five of which a token uses one."""
    layout = Layout.for_world(world, tp=world, sequence_parallel=sequence_parallel)
    with parallel_world(layout, 0, timeout_seconds=60):
        return [_count_terms(world, sequence_parallel, terms) for terms in (1, 5)]


def _count_terms(world: int, sequence_parallel: bool, count: int) -> TermCounts:
    views = tuple(View("asr", rate, None) for rate in range(1, count + 1))
    terms = LowRankTerms(4, 0.125, "a_random", ("rates",), views)
    layer = TensorParallelLoRA(terms, 0, 64, 64, 32, world, sequence_parallel, TermsOfTokens(terms))
    layer.initialize("counted", 0)
    tokens = TOKENS // world if sequence_parallel else TOKENS
    context = TokenContext.of([(str(views[0]), [tokens])])
    layer.of_tokens(context, torch.bfloat16)  # once for all layers of a pass
    for _ in range(2):
        hidden_N1H = torch.randn(tokens, 1, 64, dtype=torch.bfloat16).requires_grad_()
        qkv_N1Z = torch.zeros(TOKENS, 1, 128 // world, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as flops, Operations() as both:
            layer(hidden_N1H, qkv_N1Z, 1, context).backward(torch.ones_like(qkv_N1Z))
    return TermCounts(both.count, flops.get_total_flops(), sum(1 for _ in layer.parameters()))


@pytest.mark.parametrize(("world", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_low_rank_terms_are_called_together(world: int, sequence_parallel: bool) -> None:
    for counts in run_world(_term_counts, world, world, sequence_parallel):
        for terms, found in zip((1, 5), counts, strict=True):
            assert found.tensors == LOW_RANK_TENSORS
            # One term needs no new order of B, and ranks that have parts of the tokens gather them.
            assert found.calls == pytest.approx(LOW_RANK_CALLS, rel=0.16), found.calls
            a, b = TOKENS * 64 / (world if sequence_parallel else 1), TOKENS * (64 + 32) / 2 / world
            assert found.flops == 2 * TRAINED * 2 * terms * 4 * (a + b)
