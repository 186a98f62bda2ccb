"""The sink loss: its gradient is that of its equation, in every layout, and it does what it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import functional as F

from mome_dist.config import load_config
from mome_dist.config.load import config_of
from mome_dist.config.values import check_values
from mome_dist.data.corpus import Corpus
from mome_dist.errors import UserError
from mome_dist.llm.sinks import PrefixSinks
from mome_dist.llm.tiny import save_llm, tiny_llama, word_tokenizer
from mome_dist.model.distributed import Chunk, MicroBatch
from mome_dist.preflight import validate
from mome_dist.token_context import TokenContext
from mome_dist.verification.probe import Probe, shrunk
from mome_dist.verification.verify import Verdict, Verifier
from tests.parallel.cases import SP, by_name, case

pytestmark = pytest.mark.parallel


CASES = by_name(
    case("dp2", 2, 2),
    case("tp2", 2, 0, tp=2),
    case("tp2 sp", 2, **SP),
    case("pp2", 2, 0, pp=2),
    case("pp2 interleaved", 2, pp=2, virtual=2),
    case("ep2", 2, 1, "alltoall", ep=2),
    case("tp2 ep2 sp recompute", 4, 1, "gather", ep=2, recompute="full", **SP),
)
# As large as the cross-entropy's gradient or larger, on parameters before and inside the layers.
PROBE = ["experiment=tiny", "llm.precision=fp32", "parallel=single", "llm.sink_loss=20", "task.tasks=[asr,avsr]"]


def _verifier(folder: Path, *more: str) -> Verifier:
    return Verifier(Probe(shrunk(load_config([*PROBE, *more]), folder), steps=3))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    """LoRA behind projectors of stacked frames, one for each rate, as its authors train."""
    return _verifier(tmp_path_factory.mktemp("lora"), "method=llama_avsr")


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    """A run of experts that join a layer's output, drawn rates included."""
    return _verifier(tmp_path_factory.mktemp("mome"), "mome=layer", "mome.balance_loss=0.1", "task.sampling=rates")


def _assert_passed(verdict: Verdict) -> None:
    assert verdict.passed, (verdict.failure, verdict.comparison)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("dp2", "sgd"),
        ("dp2", "adamw"),
        ("tp2", "sgd"),
        ("tp2 sp", "sgd"),
        ("tp2 sp", "adamw"),
        ("pp2", "sgd"),
        ("pp2 interleaved", "adamw"),
    ],
)
def test_layouts_train_as_one_process(adapted: Verifier, name: str, optimizer: str) -> None:
    _assert_passed(adapted.check(CASES[name], optimizer))


@pytest.mark.parametrize(
    ("name", "optimizer"), [("ep2", "sgd"), ("ep2", "adamw"), ("tp2 ep2 sp recompute", "sgd"), ("pp2", "adamw")]
)
def test_beside_experts_too(with_experts: Verifier, name: str, optimizer: str) -> None:
    _assert_passed(with_experts.check(CASES[name], optimizer))


def _first_tokens_of_a_rank_alone() -> None:
    summed = PrefixSinks._summed

    def alone(self: PrefixSinks, rows_BH: Tensor) -> Tensor:
        # What is pulled at first tokens, and the loss itself, go around as they should: ranks agree on the wrong ones.
        return rows_BH if len(rows_BH) == self._sequences else summed(self, rows_BH)

    PrefixSinks._summed = alone  # type: ignore[method-assign]


def _mean_of_a_microbatch() -> None:
    forward = Chunk.forward

    def doubled(self: Chunk, batch: MicroBatch, share: float = 1.0, sequence_share: float = 1.0) -> Tensor:
        return forward(self, batch, share, 2 * sequence_share)

    Chunk.forward = doubled  # type: ignore[method-assign]


def _loss_of_a_rank_alone() -> None:
    take = Chunk.take_sink_loss

    def taken(self: Chunk) -> Tensor | None:
        loss = take(self)
        return loss if parallel_state.get_data_parallel_rank() == 0 else None

    Chunk.take_sink_loss = taken  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "name", "kinds"),
    [
        (_first_tokens_of_a_rank_alone, "tp2 sp", {"sink loss", "gradient"}),
        (_mean_of_a_microbatch, "dp2", {"sink loss", "gradient"}),
        (_loss_of_a_rank_alone, "dp2", {"sink loss"}),
    ],
)
def test_the_verification_catches(adapted: Verifier, fault: Callable[[], None], name: str, kinds: set[str]) -> None:
    verdict = adapted.check(CASES[name], "sgd", plant=fault)
    assert not verdict.passed and verdict.failure is None and verdict.comparison is not None
    found = {mismatch.what for mismatch in verdict.comparison.mismatches}
    assert kinds <= found and ("gradient" in kinds) == ("gradient" in found)


def test_the_gradient_is_that_of_the_equation() -> None:
    torch.manual_seed(0)
    views, prefixes = [("asr(4)", [7, 5]), ("vsr(2)", [4])], [5, 1, 4]
    context = TokenContext.of(views, prefixes=prefixes)
    hidden_NH = (3 * torch.randn(context.tokens, 6)).requires_grad_()
    terms = []
    for start, prefix in zip((0, 7, 12), prefixes, strict=True):
        if prefix > 1:  # else there is no other token
            rows = hidden_NH[start : start + prefix]
            terms.append(F.cosine_similarity(rows[:1], rows[1:]).square().mean())
    loss = 0.7 * torch.stack(terms).sum()
    (expected,) = torch.autograd.grad(loss, hidden_NH)
    found: list[Tensor] = []
    sinks = PrefixSinks.of(context, 0.7, found)
    torch.testing.assert_close(sinks.gradient(hidden_NH.detach()), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, [loss.detach()], rtol=1e-5, atol=0)
    output = sinks(hidden_NH[:, None])
    output.sum().backward()
    torch.testing.assert_close(hidden_NH.grad, expected + 1, rtol=1e-5, atol=1e-6)


def test_it_is_off_by_default_and_where_it_makes_no_sense_that_is_told(tiny_corpus_dir: Path, tmp_path: Path) -> None:
    assert config_of({"llm": {"path": "x"}}, Path("saved")).llm.sink_loss == 0, "of a run saved before"
    assert load_config(["experiment=lrs3", "method=omni_avsr/st"]).llm.sink_loss == 0
    with pytest.raises(UserError, match=r"llm\.sink_loss=-1\.0: must be at least 0"):
        check_values(load_config(["experiment=tiny", "llm.sink_loss=-1"]))
    tokenizer = word_tokenizer(utterance.text for utterance in Corpus.open(tiny_corpus_dir).split("train"))
    save_llm(tiny_llama(tokenizer, hidden=16, layers=1, ffn_width=16), tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"llm\.sink_loss=1\.0 is of all layers but the last, and .* has one"):
        validate(load_config(["experiment=tiny", "parallel=single", "llm.sink_loss=1", f"llm.path={tmp_path}"]), 1)
