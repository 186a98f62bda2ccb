"""Operations that a training step starts, counted: each is a kernel on a GPU, asked for by Python on the host.

    python -m benchmarks.launches

One process, on the CPU, with the views of ``experiment=lrs3`` and its MoME modules in a small random LLM in bf16: how
many operations there are depends on layers and views, not on widths. What a layer adds is the difference of two depths.
Norms and attention, for which a GPU has one kernel each and a CPU many, count as one: something of as many operations
takes their place. A MoME module is counted in PyTorch's form, and once more with its Triton kernels, for which the same
is done: they run on CUDA alone (`mome_dist.moe.triton`). `benchmarks.gpu.step` counts the kernels of a real GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import machine
from benchmarks.operations import Operations
from benchmarks.results import RESULTS, table, write_results
from mome_dist.cli import main_guard
from mome_dist.config import load_config
from mome_dist.llm.attention import CausalAttention
from mome_dist.llm.norm import RMSNorm
from mome_dist.model.build import build_distributed
from mome_dist.moe.dispatch import gather
from mome_dist.moe.triton import experts
from mome_dist.parallel.forked import run_forked
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.verification.probe import Probe, small_modules, write_random_llama

DEPTHS = (2, 4)
LAYERS = 28  # of Llama 3.2-3B
NO_MOME, PYTORCH, TRITON = "no MoME", "PyTorch's form", "Triton's kernels"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--clips", type=int, default=3, help="of a microbatch; changes no count")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    return parser.parse_args(arguments)


def count_step(llm: str, layers: int, form: str, clips: int) -> dict[str, int]:
    """Operations of one microbatch by direction; on a rank that was forked for it.

    Args:
        form: of the MoME modules: `NO_MOME`, `PYTORCH` or `TRITON`.
    """
    directory = write_random_llama(Path(llm) / f"{layers}", layers)
    config = small_modules(load_config(["experiment=lrs3", "llm.precision=bf16"]), directory)
    config.mome = dataclasses.replace(config.mome, placement="ffn")
    layout = Layout.for_world(1)
    with parallel_world(layout, 0, 60):
        probe = Probe(config, 1)
        model = build_distributed(config, layout, probe.widths, "local", torch.device("cpu")).train()
        batch, (chunk,) = probe.microbatch(range(clips)), model.parts()
        if form == NO_MOME:
            for layer in chunk.llm.decoder.layers:
                layer.slot("ffn").mome = None
            chunk.momes.clear()
        with _one_operation_each(), _triton_kernels(form == TRITON):
            with Operations() as forward:
                losses_V = chunk(batch)
            with Operations() as backward:
                losses_V.sum().backward()
    return {"forward": forward.count, "backward": backward.count}


@contextmanager
def _one_operation_each() -> Iterator[None]:
    """Let each norm be one operation, forward and backward, and each attention two: a copy of the queries and the
    product, and in the backward pass the product and the join of gradients."""

    def norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.weight

    def attention(self: Any, qkv_NGXd: torch.Tensor, _context: Any) -> torch.Tensor:
        return qkv_NGXd[:, :, :-2].reshape(qkv_NGXd.shape[0], -1) * 1.0

    kept = RMSNorm.forward, CausalAttention.forward
    RMSNorm.forward, CausalAttention.forward = norm, attention  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        RMSNorm.forward, CausalAttention.forward = kept  # type: ignore[method-assign]


@contextmanager
def _triton_kernels(used: bool) -> Iterator[None]:
    """Let each kernel be one operation, which writes what tells where tokens go; the rest of its results is what was in
    memory, and no count depends on it."""

    def forward(form: experts.LayerForm, logits_TE: Tensor, narrow_TN: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        tokens, members_VT = len(logits_TE), inputs[-1]
        return (
            narrow_TN.new_empty(tokens, form.experts * (form.units + 1)),
            torch.zeros(tokens, form.top_k, dtype=torch.int64),
            logits_TE.new_empty(1, len(members_VT), form.routed + 1),
        )

    def backward(_form: experts.LayerForm, logits_TE: Tensor, narrow_TN: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        grad_inputs_TM = inputs[-2]
        return torch.empty_like(grad_inputs_TM), torch.zeros_like(narrow_TN), torch.empty_like(logits_TE)

    kept = gather.runs_as_one_kernel, experts.launch_forward, experts.launch_backward
    if used:
        gather.runs_as_one_kernel = lambda *_: True
        experts.launch_forward, experts.launch_backward = forward, backward  # type: ignore[assignment]
    try:
        yield
    finally:
        gather.runs_as_one_kernel, experts.launch_forward, experts.launch_backward = kept


def counted(clips: int = 3) -> dict[str, dict[str, int]]:
    """Operations, forward and backward, by what they are of: a frozen layer, a MoME module, the rest of a pass, and a
    pass of as many layers as the LLM has."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            (layers, form): run_forked(count_step, 1, folder, layers, form, clips)[0]
            for layers in DEPTHS
            for form in (NO_MOME, PYTORCH, TRITON)
        }

    def layer(form: str, way: str) -> int:
        shallow, deep = (found[layers, form][way] for layers in DEPTHS)
        return (deep - shallow) // (DEPTHS[1] - DEPTHS[0])

    ways = ("forward", "backward")
    frozen = {way: layer(NO_MOME, way) for way in ways}
    figures = {"frozen layer": frozen}
    for form in (PYTORCH, TRITON):
        both = {way: layer(form, way) for way in ways}
        rest = {way: found[DEPTHS[0], form][way] - DEPTHS[0] * both[way] for way in ways}
        figures |= {
            f"MoME module, {form}": {way: both[way] - frozen[way] for way in ways},
            f"rest of a pass, {form}": rest,
            f"a pass of {LAYERS} layers, {form}": {way: LAYERS * both[way] + rest[way] for way in ways},
        }
    return figures


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Count, write the table and print it."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    figures = counted(options.clips)
    rows = [[name, f"{each['forward']:,}", f"{each['backward']:,}"] for name, each in figures.items()]
    path = write_results(
        name="launches",
        title="Operations of a training step",
        command=" ".join(["python -m benchmarks.launches", *given]),
        machine=machine(),
        sections=[table(["of", "forward", "backward"], rows)],
        figures=figures,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
