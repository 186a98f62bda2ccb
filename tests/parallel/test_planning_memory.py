"""The planner's memory against what a real model keeps: every tensor that autograd saves, counted by its storage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mome_dist.config import load_config
from mome_dist.config.schema import LLMLoRAConfig, RunConfig
from mome_dist.llm.shape import LLMShape
from mome_dist.model.build import build_distributed
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.planning.job import Candidate, Clip, Job, job_of, typical_batch
from mome_dist.planning.memory import frozen_bytes, memory
from mome_dist.training.batches import token_multiple
from mome_dist.verification.probe import WIDTHS, Probe
from tests import tiny_llms
from tests.parallel.worlds import run_world

pytestmark = pytest.mark.parallel
# Wide enough that what the planner leaves out (masks, indices, statistics of norms) is small beside what it counts.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 4, "head_dim": 32}
CASES = [
    Candidate(Layout.for_world(1), 1, "local", 1),
    Candidate(Layout.for_world(1, recompute="selective"), 1, "local", 1),
    Candidate(Layout.for_world(1), 1, "alltoall", 1),
    Candidate(Layout.for_world(2, ep=2), 1, "gather", 1),
    Candidate(Layout.for_world(2, tp=2), 1, "local", 1),
    Candidate(Layout.for_world(2, tp=2, sequence_parallel=True), 1, "local", 1),
]


def _config(llm: Path, precision: str) -> RunConfig:
    config = load_config(["mome.routed_experts=24", "data.batch_size=16"])
    config.llm.path, config.llm.precision = str(llm), precision
    config.projector.hidden_size = 32
    config.task.tasks, config.task.asr_audio_rates = ["asr"], [1]
    return config


def _kept(config: RunConfig, candidate: Candidate) -> dict[str, float]:
    """Bytes of this rank's parameters, and of what autograd keeps of a forward pass; and the positions of the pass."""
    layout, probe = candidate.layout, Probe(config, 1)
    with parallel_world(layout, 0, timeout_seconds=60) as at:
        model = build_distributed(config, layout, probe.widths, candidate.dispatch, torch.device("cpu")).train()
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        # Clips of one length, as the planner has them: what pads attention is beside the point.
        clips = typical_batch(config.data) // layout.dp
        batch = probe.microbatch([at.dp] * clips, token_multiple(layout))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.parts()[0](batch)
        kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        own = {True: 0, False: 0}
        for parameter in model.parameters():
            own[parameter.requires_grad] += parameter.numel() * parameter.element_size()
        assert loss.requires_grad
        tokens = batch.tokens
        return {
            "kept": kept,
            "frozen": own[False],
            "trained": own[True],
            "length": tokens.context.alive / len(tokens.context.lengths),
            "labels": tokens.labels.ids_L.numel() / len(tokens.context.lengths),
        }


def _job(config: RunConfig, length: float, labels: float) -> Job:
    job = job_of(config, LLMShape.from_directory(config.llm.path), Clip(), WIDTHS, on_gpu=False)
    one_view = {"lengths": (int(length),), "shares": (1.0,), "longest": (int(length),)}
    return Job(**{**vars(job), **one_view, "labels": labels})


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llms.save(tiny_llms.llama3(**SIZES), tmp_path_factory.mktemp("llm"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("candidate", CASES, ids=lambda candidate: candidate.name())
def test_what_is_counted_is_what_is_kept(llm: Path, candidate: Candidate, precision: str) -> None:
    _compare(_config(llm, precision), candidate)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("candidate", CASES[-2:], ids=lambda candidate: candidate.name())
@pytest.mark.parametrize("placement", ["mhsa", "none"])
def test_low_rank_terms_are_counted_too(llm: Path, candidate: Candidate, precision: str, placement: str) -> None:
    config = _config(llm, precision)
    config.mome.placement = placement
    config.llm.lora = LLMLoRAConfig(rank=64, terms=["shared", "rates"])
    _compare(config, candidate)


def _compare(config: RunConfig, candidate: Candidate) -> None:
    for rank in run_world(_kept, candidate.layout.world_size, config, candidate):
        job = _job(config, rank["length"], rank["labels"])
        need = memory(job, candidate, 0)
        assert rank["frozen"] == frozen_bytes(job, candidate, 0)
        assert rank["trained"] == need.gradients
        # The planner takes all positions for speech, and leaves out masks, statistics of norms and rotary factors.
        assert need.activations + need.experts + need.logits == pytest.approx(rank["kept"], rel=0.05)
