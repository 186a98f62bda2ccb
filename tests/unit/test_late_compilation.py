"""A rank does not load torch's compiler to start, and what a library compiles is compiled all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from mome_dist.late_compilation import _when_called

ROOT = Path(__file__).resolve().parents[2]
START = """
import sys
from mome_dist.late_compilation import compile_when_called
compile_when_called()
import deepspeed.runtime.zero.muon.muon_optimizer  # every engine does
import mome_dist.training.loop
assert "megatron.core.fusions.fused_bias_geglu" in sys.modules, "it compiles what it defines"
assert "torch._inductor.compile_fx" not in sys.modules
"""


def test_a_rank_starts_without_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", START], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_library_compiles_is_compiled_once_by_its_first_call() -> None:
    compiled: list[dict[str, object]] = []

    def compile_now(function: object, **options: object) -> object:
        compiled.append(options)
        return torch.compile(function, backend="eager", **options)  # type: ignore[call-overload]

    decorator = _when_called(compile_now)

    @decorator(dynamic=True)
    def own(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    assert compiled == [{"dynamic": True}], "what is not a library's is compiled where it is defined"

    def fused(x: torch.Tensor, *, by: int) -> torch.Tensor:
        """Multiply, as a function of Megatron-Core would."""
        return x * by

    fused.__module__ = "megatron.core.fusions.fused"
    later = decorator(fused)
    assert len(compiled) == 1 and later.__doc__ == fused.__doc__
    for _ in range(2):
        assert later(torch.ones(2), by=3).tolist() == [3.0, 3.0]
    assert compiled == [{"dynamic": True}, {}]
