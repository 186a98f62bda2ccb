"""Real steps of one layout on this machine's CPU: the memory of every rank, and the seconds of a step."""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measuring import CPU, Stopwatch, meet, slowest
from benchmarks.step_parts import WIDTHS, microbatch
from mome_dist.config.derived import views_of
from mome_dist.config.schema import RunConfig
from mome_dist.engine.engine import Engine
from mome_dist.model.build import build_distributed
from mome_dist.parallel.initialize import parallel_world
from mome_dist.planning.job import Candidate, Clip
from mome_dist.training.batches import Step, token_multiple
from mome_dist.training.step import forward_backward

WARM_UP_STEPS = 1  # it makes the optimiser's state and prepares kernels
# Bytes from which the C library gives every block its own pages, which go back to the system when it is freed: what a
# process occupies is then what it uses, give or take a few pages.
OWN_PAGES = 64 * 1024
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
M_ARENA_MAX = -8


def give_back_freed_memory() -> None:
    """Let freed memory leave the process at once. For measuring memory only: it costs time."""
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_THRESHOLD, OWN_PAGES), (M_TRIM_THRESHOLD, OWN_PAGES), (M_ARENA_MAX, 1)):
        libc.mallopt(option, value)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def occupied() -> int:
    """Bytes that this process occupies now."""
    return _status("VmRSS")


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes that this process occupied inside, as the kernel counts them."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest value starts again at the present one
    found = [0]
    yield found
    found[0] = _status("VmHWM")


def write_llama(directory: Path, sizes: Mapping[str, int], weights: bool = True) -> Path:
    """A random Llama of the given sizes, as a Hugging Face directory without tokenizer, or its shape alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes, max_position_embeddings=1024, tie_word_embeddings=False, architectures=["LlamaForCausalLM"]
    )
    if weights:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    else:
        config.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Trial:
    """What is run: a configuration on a layout."""

    config: RunConfig
    candidate: Candidate
    clip: Clip


def _step(trial: Trial) -> Step:
    config, candidate = trial.config, trial.candidate
    assert config.data.batch_size is not None
    each = config.data.batch_size // (candidate.accumulation * candidate.layout.dp)
    views, clip, multiple = views_of(config), trial.clip, token_multiple(candidate.layout)
    batches = [
        microbatch(views, [clip.seconds] * each, clip.text_tokens, clip.prompt_tokens, multiple)
        for _ in range(candidate.accumulation)
    ]
    return Step(batches, views, (trial.clip.text_tokens + 1) * config.data.batch_size, config.data.batch_size)


def run_steps(trial: Trial, rounds: int) -> list[float]:
    """Seconds of each step of this rank's world, of its slowest rank; inside an open world."""
    config, candidate = trial.config, trial.candidate
    settings = {"zero_optimization": {"stage": candidate.zero}}
    model = build_distributed(config, candidate.layout, WIDTHS, candidate.dispatch, CPU).train()
    engine = Engine(model, config.optimizer, settings, candidate.layout.sequence_parallel)
    seconds = []
    for number in range(WARM_UP_STEPS + rounds):
        step = _step(trial)
        meet()
        watch = Stopwatch(CPU)
        with engine.accumulate():
            forward_backward(model, step)
        engine.step(1e-5)
        watch.mark()
        (elapsed,) = slowest(watch.parts())
        if number >= WARM_UP_STEPS:
            seconds.append(elapsed.device)
    return seconds


def measure_memory(trial: Trial, toy: RunConfig) -> dict[str, int]:
    """This rank's peak above its baseline, which is what the same program occupies at most with a model of nothing."""
    give_back_freed_memory()
    with parallel_world(trial.candidate.layout, 0, timeout_seconds=300):
        with peak() as baseline:
            run_steps(Trial(toy, trial.candidate, trial.clip), 1)
        gc.collect()
        with peak() as highest:
            run_steps(trial, 1)
        return {"baseline": baseline[0], "peak": highest[0]}


def measure_seconds(trial: Trial, rounds: int) -> float:
    """Median seconds of a step."""
    with parallel_world(trial.candidate.layout, 0, timeout_seconds=300):
        return statistics.median(run_steps(trial, rounds))
