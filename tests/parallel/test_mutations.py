"""Planted faults: each mistake that distributed training is known for is caught, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from mome_dist.engine import engine as engine_module
from mome_dist.engine.engine import Engine
from mome_dist.model.distributed import Chunk, MicroBatch
from mome_dist.moe.dispatch.exchange import Exchange
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.load import PassLoad
from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.token_context import Labels, TokenContext
from mome_dist.verification.cases import standard_cases
from mome_dist.verification.compare import explain
from mome_dist.verification.probe import Probe
from mome_dist.verification.verify import Verifier

CASES = {case.name: case for case in standard_cases()}
MICROBATCHES = 2  # of a step of the verifier


def _twice_the_gradient_of_what_was_dispatched() -> None:
    launch = Exchange.__init__

    def doubled(self: Exchange, forward: Any, backward: Any) -> None:
        launch(self, forward, lambda gradient: backward(gradient * 2))

    Exchange.__init__ = doubled  # type: ignore[method-assign]


def _one_expert_without_gradient() -> None:
    accumulate = Engine.accumulate

    @contextmanager
    def dropping(self: Engine) -> Iterator[None]:
        with accumulate(self):
            yield
            layer: Any = self._modules["layer_1"]
            layer.deepspeed_moe.experts.packed.grad[0].zero_()

    Engine.accumulate = dropping  # type: ignore[method-assign]


def _router_cut_off() -> None:
    def detached(self: TopKRouter, hidden: torch.Tensor, tokens: RoutedTokens | None) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.detach()) + 0.0 * self.weight.sum()

    TopKRouter.logits = detached  # type: ignore[method-assign,assignment]


def _auxiliary_loss_of_the_shard() -> None:
    reduce = PassLoad.reduce

    def alone(self: PassLoad) -> None:
        self.group = None
        reduce(self)

    PassLoad.reduce = alone  # type: ignore[method-assign]


def _clipping_by_the_norm_of_own_experts() -> None:
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    engine_module._expert_group = lambda _modules: alone[dist.get_rank()]  # type: ignore[assignment]


def _experts_of_the_other_rank() -> None:
    right = ExpertParallelMoME.ep_rank.fget  # type: ignore[attr-defined]
    initialize = ExpertParallelMoME.initialize

    def swapped(self: ExpertParallelMoME, prefix: str, seed: int) -> None:
        ExpertParallelMoME.ep_rank = property(lambda it: it.ep_size - 1 - right(it))  # type: ignore[assignment,method-assign]
        initialize(self, prefix, seed)
        ExpertParallelMoME.ep_rank = property(right)  # type: ignore[assignment,method-assign]

    ExpertParallelMoME.initialize = swapped  # type: ignore[method-assign]


def _one_rate_skipped() -> None:
    step = Probe.step

    def shortened(self: Probe, *args: Any) -> Any:
        whole = step(self, *args)
        return replace(whole, microbatches=[_without_last_view(each) for each in whole.microbatches])

    Probe.step = shortened  # type: ignore[method-assign,assignment]


def _without_last_view(batch: MicroBatch) -> MicroBatch:
    tokens = batch.tokens
    kept_L = tokens.context.members_VN[-1, tokens.labels.index_L] == 0
    labels = Labels(tokens.labels.index_L[kept_L], tokens.labels.ids_L[kept_L])
    return replace(batch, tokens=replace(tokens, labels=labels))


def _loss_divided_by_the_microbatches_twice() -> None:
    forward = Chunk.forward

    def divided(self: Chunk, batch: MicroBatch, share: float = 1.0, sequence_share: float = 1.0) -> torch.Tensor:
        output = forward(self, batch, share, sequence_share)
        return output / MICROBATCHES if self.llm.post_process else output

    Chunk.forward = divided  # type: ignore[method-assign]


def _sequence_parts_not_added_up() -> None:
    Engine._sum_over_sequence = lambda self: None  # type: ignore[method-assign]


def _dead_tokens_routed() -> None:
    forward = ExpertParallelMoME.forward

    def as_of_the_last_view(
        self: ExpertParallelMoME, hidden: torch.Tensor, tokens: TokenContext, load: PassLoad | None = None
    ) -> torch.Tensor:
        members_VN = tokens.members_VN.clone()
        members_VN[-1] = 1 - members_VN[:-1].sum(dim=0)
        sizes_V2 = tokens.sizes_V2[:, 1:].expand(-1, 2)
        return forward(self, hidden, replace(tokens, members_VN=members_VN, sizes_V2=sizes_V2, alive_N=None), load)

    ExpertParallelMoME.forward = as_of_the_last_view  # type: ignore[method-assign, assignment]


FAULTS: list[tuple[Callable[[], None], str, str, str]] = [
    # the fault, the case that meets it, what the report names, and the ratio that it gives ("" for any)
    (_twice_the_gradient_of_what_was_dispatched, "ep2 gather", ".routed.", "2.00 = ep = dp = microbatches"),
    (_one_expert_without_gradient, "ep2", "mome.1.routed.", ""),
    (_router_cut_off, "dp2 zero1", "router_weight", ""),
    (_auxiliary_loss_of_the_shard, "ep2", "router_weight", ""),
    (_clipping_by_the_norm_of_own_experts, "ep2 zero0", "ranks disagree on the gradient norm", ""),
    (_experts_of_the_other_rank, "ep2", "", ""),
    (_one_rate_skipped, "one process, all-to-all", "step", ""),
    (_loss_divided_by_the_microbatches_twice, "one process, local", "step", "0.50 = 1/microbatches"),
    (_sequence_parts_not_added_up, "tp2 sp", "ranks hold different copies of mome.", ""),
    (_dead_tokens_routed, "dp2 zero1", "", ""),
]


@pytest.mark.parametrize(
    ("fault", "case", "name", "ratio"), FAULTS, ids=[fault[0].__name__.strip("_") for fault in FAULTS]
)
def test_the_verification_catches(
    verifier: Verifier, fault: Callable[[], None], case: str, name: str, ratio: str
) -> None:
    assert verifier.check(CASES[case], "sgd").passed  # without the fault
    verdict = verifier.check(CASES[case], "sgd", plant=fault)
    assert not verdict.passed
    if verdict.comparison is None:  # ranks do not even agree with each other
        assert verdict.failure is not None and verdict.failure.startswith(name)
        return
    found = [mismatch for mismatch in verdict.comparison.mismatches if name in mismatch.name]
    assert found, verdict.comparison.mismatches
    if ratio:
        spelled = {explain(mismatch.ratio, CASES[case].layout, microbatches=MICROBATCHES) for mismatch in found}
        assert ratio in spelled, spelled
