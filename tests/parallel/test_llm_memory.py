"""A rank reads its own slices: its memory never holds more of the LLM than that, not even for a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mome_dist.llm.megatron import build_frozen_llm
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.weights import load_weights
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from tests import tiny_llms
from tests.parallel.worlds import run_world

# Two matrices of 64 MiB in fp32, and little else.
WIDE = {"vocab_size": 32768, "hidden_size": 512, "num_hidden_layers": 1}


def _own_memory() -> int:
    """Bytes of this process that are no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Growth of this process's own memory at its highest, looked at every millisecond."""
    before, peak, done = _own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _own_memory() - before)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _load(directory: Path) -> tuple[int, int]:
    """Peak growth while weights are read, and bytes of this rank's parameters."""
    layout = Layout.for_world(2, tp=2)
    with parallel_world(layout, 0, timeout_seconds=60):
        shape = LLMShape.from_directory(directory)
        llm = build_frozen_llm(shape, torch.float32, "eager", torch.device("cpu"), layout)
        with _peak() as peak:
            load_weights(llm, shape, directory)
        return peak[0], sum(parameter.numel() * parameter.element_size() for parameter in llm.parameters())


def test_reading_slices_takes_the_memory_of_slices(tmp_path: Path) -> None:
    directory = tiny_llms.save(tiny_llms.llama3(**WIDE), tmp_path)
    whole = (directory / "model.safetensors").stat().st_size
    for peak, own in run_world(_load, 2, directory):
        assert own < 0.55 * whole
        assert peak < 1.1 * own + 2**20
