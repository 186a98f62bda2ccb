"""Every method of the family trains in layouts as one process does, and what they share in their own ways is watched:
faults of each kind are caught."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mome_dist.adapters.tensor_parallel import TensorParallelLoRA, TermsOfTokens
from mome_dist.config import load_config
from mome_dist.engine.engine import Engine
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.parts import NamedPart
from mome_dist.speech import mixture
from mome_dist.speech.balance import ProjectorBalance
from mome_dist.training.adaptation import Adaptation
from mome_dist.training.batches import Step
from mome_dist.tuning.forked import timed_steps
from mome_dist.verification.compare import explain
from mome_dist.verification.encoders import RankEncoders
from mome_dist.verification.probe import Probe, shrunk, write_random_llama
from mome_dist.verification.run import Case
from mome_dist.verification.verify import Verifier
from tests.parallel.worlds import run_world
from tests.unit.test_methods import METHODS

Verifiers = Callable[[str], Verifier]

CASES = {
    case.name: case
    for case in (
        Case("dp2", Layout.for_world(2), 1, "local"),
        Case("tp2", Layout.for_world(2, tp=2), 1, "local"),
        Case("tp2 zero0", Layout.for_world(2, tp=2), 0, "local"),
        Case("tp2 sp", Layout.for_world(2, tp=2, sequence_parallel=True), 1, "local"),
        Case("all", Layout.for_world(4, tp=2, pp=2, sequence_parallel=True, recompute="full"), 2, "local"),
        Case("encoders", Layout.for_world(4, tp=2), 1, "local", train_projectors=False),
    )
}


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory: pytest.TempPathFactory) -> Verifiers:
    """By method, with what its file says."""

    @cache
    def of(method: str) -> Verifier:
        settings = ["experiment=tiny", "llm.precision=fp32", "parallel=single", f"method={method}"]
        return Verifier(Probe(shrunk(load_config(settings), tmp_path_factory.mktemp("llm")), steps=3))

    return of


def _check(verifier: Verifier, case: str, optimizer: str) -> None:
    verdict = verifier.check(CASES[case], optimizer)
    assert verdict.passed, (verdict.failure, verdict.comparison)


@pytest.mark.parametrize("method", METHODS)
def test_each_trains_as_one_process_does(verifiers: Verifiers, method: str) -> None:
    """Slices over two ranks, two stages, each rank a part of the tokens, layers computed twice, ZeRO 2."""
    _check(verifiers(method), "all", "sgd" if METHODS.index(method) % 2 else "adamw")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_encoders_that_train_share_their_clips(verifiers: Verifiers, optimizer: str) -> None:
    """Two data-parallel ranks of two tensor-parallel ones each; projectors are kept, so that gradients pass them."""
    verifier = verifiers("omni_avsr/st")
    _check(verifier, "encoders", optimizer)
    found = verifier._references[None, "fp32", False, optimizer].gradients
    terms = [name for name in found if name.startswith("lora.video.")]
    assert len(terms) == 4 and all(found[name].any() for name in terms)
    assert not any(name.startswith("projectors.") for name in found)


def test_the_tuner_times_steps_of_encoders_that_train(tmp_path: Path) -> None:
    llm, losses = write_random_llama(tmp_path), []
    for world in (1, 2):
        layout = ["parallel=single", f"parallel.tp={world}"]
        config = load_config(["experiment=tiny", "llm.precision=fp32", "method=omni_avsr/st", *layout])
        steps = run_world(timed_steps, world, config, llm, {"zero_optimization": {"stage": 1}}, 3)[0]
        assert min(step.seconds for step in steps) > 0
        losses.append([step.loss for step in steps])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0][0] != losses[0][2]


def _sequence_parts_not_summed() -> None:
    Engine._sum_over_sequence = lambda self: None  # type: ignore[method-assign]


def _sequence_parts_averaged() -> None:
    summed = Engine._sum_over_sequence

    def averaged(self: Engine) -> None:
        summed(self)
        for parameter, sharing in self._sharing.items():
            if sharing.partial and parameter.grad is not None:
                parameter.grad /= 2

    Engine._sum_over_sequence = averaged  # type: ignore[method-assign]


def _slices_divided_by_their_ranks() -> None:
    forward = TensorParallelLoRA.forward

    def divided(self, hidden, qkv, groups, context):  # type: ignore[no-untyped-def]
        if not self.b._backward_hooks:
            self.b.register_hook(lambda gradient: gradient / 2)
        return forward(self, hidden, qkv, groups, context)

    TensorParallelLoRA.forward = divided  # type: ignore[method-assign]


def _slices_of_the_other_rank() -> None:
    here = NamedPart.here

    def swapped(self: NamedPart, whole: torch.Tensor) -> torch.Tensor:
        sliced = self.sharing.sliced
        return here(self, whole if sliced is None else whole.roll(whole.shape[sliced] // 2, sliced))

    NamedPart.here = swapped  # type: ignore[method-assign]


def _slices_counted_once_in_the_norm() -> None:
    Engine._is_sliced = lambda self, parameter: False  # type: ignore[method-assign]


def _terms_of_other_views() -> None:
    found = TermsOfTokens.__call__
    TermsOfTokens.__call__ = lambda self, *args: found(self, *args).roll(1, dims=1)  # type: ignore[method-assign]


def _shares_of_clips_not_summed() -> None:
    Adaptation._sum_shares = lambda self, gradients: None  # type: ignore[method-assign]


def _clips_counted_on_every_rank() -> None:
    load = RankEncoders.load

    def whole(self: RankEncoders, step: Step) -> Step:
        keep, held = Adaptation.keep, self._adaptation
        held.keep = lambda stream, ids, clips: None  # type: ignore[method-assign]
        loaded = load(self, step)
        for stream in self._encoders:
            names = [f"{m}.{n}" for m, each in enumerate(step.microbatches) for n in range(len(each.features[stream]))]
            keep(held, stream, names, [clip for each in step.microbatches for clip in each.features[stream]])
        return loaded

    RankEncoders.load = whole  # type: ignore[method-assign]


def _projector_experts_not_renormalised() -> None:
    route = mixture.route
    mixture.route = lambda logits, top_k, renormalize: route(logits, top_k, False)  # type: ignore[assignment,misc]


def _projector_balance_divided_by_the_ranks() -> None:
    of_pass = ProjectorBalance.of_pass
    ProjectorBalance.of_pass = lambda self, views, share: of_pass(self, views, share / 2)  # type: ignore[method-assign]


def _projector_experts_see_one_rank() -> None:
    accumulate = Engine._reduction

    def alone(self: Engine):  # type: ignore[no-untyped-def]
        pools: Any = self._modules["projectors"]
        first = torch.distributed.get_rank() == 0
        for parameter in pools.mixture.experts.parameters():
            if not parameter._backward_hooks:
                parameter.register_hook(lambda gradient: gradient * 2 * first)
        return accumulate(self)

    Engine._reduction = alone  # type: ignore[method-assign]


def _weights_of_tasks_made_to_add_up() -> None:
    weights = Step.weights.fget  # type: ignore[attr-defined]
    Step.weights = property(lambda self: [3 * w / sum(weights(self)) for w in weights(self)])  # type: ignore[assignment]


def _weights_of_other_tasks() -> None:
    weights = Step.weights.fget  # type: ignore[attr-defined]
    Step.weights = property(lambda self: [*weights(self)[1:], weights(self)[0]])  # type: ignore[assignment]


MSS, ST, DEJR = "llama_mtsk/mss", "omni_avsr/st", "llama_smop/dejr"
FAULTS: list[tuple[Callable[[], None], str, str, str, str]] = [
    # the fault, the method and the case that meet it, what the report names, and the ratio that it gives ("" for any)
    (_sequence_parts_not_summed, MSS, "tp2 sp", "ranks hold different copies of llm_lora.", ""),
    (_sequence_parts_averaged, MSS, "tp2 sp", ".a", "0.50 = 1/tp = 1/microbatches"),
    (_slices_divided_by_their_ranks, MSS, "tp2", ".b", "0.50 = 1/tp = 1/microbatches"),
    (_slices_of_the_other_rank, MSS, "tp2", "llm_lora.", ""),
    (_slices_counted_once_in_the_norm, MSS, "tp2 zero0", "ranks disagree on the gradient norm", ""),
    (_terms_of_other_views, MSS, "dp2", "llm_lora.", ""),
    (_shares_of_clips_not_summed, ST, "tp2", "ranks hold different copies of lora.video.", ""),
    (_clips_counted_on_every_rank, ST, "tp2", "lora.video.", "2.00 = tp = microbatches"),
    (_projector_experts_not_renormalised, DEJR, "dp2", "projectors.", ""),
    (_projector_balance_divided_by_the_ranks, DEJR, "dp2", "routers.", ""),
    (_projector_experts_see_one_rank, DEJR, "dp2", "experts.", ""),
    (_weights_of_tasks_made_to_add_up, ST, "dp2", "step", "0.8571"),
    (_weights_of_other_tasks, ST, "dp2", "step", ""),
]


@pytest.mark.parametrize(
    ("fault", "method", "case", "name", "ratio"), FAULTS, ids=[fault[0].__name__.strip("_") for fault in FAULTS]
)
def test_the_verification_catches(
    verifiers: Verifiers, fault: Callable[[], None], method: str, case: str, name: str, ratio: str
) -> None:
    verdict = verifiers(method).check(CASES[case], "sgd", plant=fault)
    if verdict.comparison is None:  # ranks do not even agree with each other
        assert verdict.failure is not None and name in verdict.failure
        return
    found = [mismatch for mismatch in verdict.comparison.mismatches if name in mismatch.name]
    assert found, verdict.comparison
    if ratio:
        spelled = {explain(mismatch.ratio, CASES[case].layout, microbatches=2) for mismatch in found}
        assert ratio in spelled, spelled


@pytest.mark.parametrize(("method", "case"), sorted({(method, case) for _, method, case, *_ in FAULTS}))
def test_without_a_fault_it_has_nothing_to_say(verifiers: Verifiers, method: str, case: str) -> None:
    _check(verifiers(method), case, "sgd")
