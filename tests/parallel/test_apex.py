"""NVIDIA's Apex is used where it can be imported, its checkpoints and PyTorch's are one, and no other apex is taken.

A stand-in has its names and signatures and PyTorch's arithmetic; forked ranks and a process of their own find it on
``sys.path`` and are told that their CPU has Apex's kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mome_dist import nvidia_apex
from mome_dist.config import load_config
from mome_dist.preflight import validate
from mome_dist.training import loop
from tests.parallel.runs import Lab
from tests.parallel.worlds import run_world

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "apex_stand_in"


def _take_stand_in() -> None:
    sys.path.insert(0, str(STAND_IN))
    nvidia_apex._find.cache_clear()  # the process that this one was forked from may have looked before
    nvidia_apex.runs_on = lambda device: True


def _train_with_apex(overrides: list[str], cache: Path) -> tuple[list[float], list[int], int]:
    """Losses of the steps done, the steps that the first group's kernel was told, and calls of the norm's kernel."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    _take_stand_in()
    import amp_C
    import fused_layer_norm_cuda

    config = load_config(overrides)
    losses = loop.train(config, validate(config, int(os.environ["WORLD_SIZE"])))
    return losses, [step for _, step in amp_C.CALLS][::2], len(fused_layer_norm_cuda.CALLS)


def _overrides(steps: int, zero: str) -> list[str]:
    # The rate does not depend on the number of steps: the first part of a run is one of fewer steps.
    rate = ("optimizer.warmup_steps=0", "optimizer.final_fraction=1")
    return ["parallel.ep=2", f"deepspeed={zero}", f"training.steps={steps}", *rate]


@pytest.fixture(scope="module")
def unbroken(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return lab.train(2, tmp_path_factory.mktemp("unbroken"), *_overrides(5, "zero1"), ep=2)


def test_what_apex_began_pytorch_continues(
    lab: Lab, unbroken: list[float], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = lab.overrides(tmp_path, *_overrides(3, "zero0"))
    losses, counted, norms = run_world(_train_with_apex, 2, overrides, lab.cache)[0]
    assert "AdamW: FusedAdam of NVIDIA Apex; norms: FusedRMSNorm of NVIDIA Apex" in capfd.readouterr().err
    assert losses == pytest.approx(unbroken[:3], rel=1e-5)
    assert counted == [1, 2, 3] and norms > 0
    assert lab.train(2, tmp_path, *_overrides(5, "zero0"), ep=2) == pytest.approx(unbroken[3:], rel=1e-5)


def test_what_pytorch_began_apex_continues(lab: Lab, unbroken: list[float], tmp_path: Path) -> None:
    lab.train(2, tmp_path, *_overrides(3, "zero1"), ep=2)
    overrides = lab.overrides(tmp_path, *_overrides(5, "zero1"))
    losses, counted, _ = run_world(_train_with_apex, 2, overrides, lab.cache)[0]
    assert losses == pytest.approx(unbroken[3:], rel=1e-5)
    assert counted == [4, 5]


SCRIPT = """
import json, sys, torch
from types import SimpleNamespace
from mome_dist import nvidia_apex
from mome_dist.config.schema import OptimizerConfig
from mome_dist.llm.norm import RMSNorm
from mome_dist.engine.optimizer import make_optimizer
import deepspeed, megatron.core.transformer.transformer_block  # they look for Apex at import
cpu = torch.device("cpu")
told = [nvidia_apex.describe(cpu)]
groups = [{"params": [torch.zeros(2)]}]
own = type(make_optimizer(groups, OptimizerConfig())).__module__
nvidia_apex.runs_on = lambda device: True
told.append(nvidia_apex.describe(cpu))
used = type(make_optimizer(groups, OptimizerConfig())).__module__
norms = []
for dtype in (torch.float32, torch.bfloat16):
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype), 8, eps=1e-5)
    norm.weight.data.copy_(torch.linspace(0.5, 2, 8))
    results = []
    for runs in (False, True):
        nvidia_apex.runs_on = lambda device: runs
        hidden = torch.linspace(-3, 5, 24).reshape(3, 8).to(dtype).requires_grad_()
        output = norm(hidden)
        output.backward(torch.linspace(1, 2, 24).reshape(3, 8).to(dtype))
        results.append((output, hidden.grad))
    (own_out, own_grad), (out, grad) = results
    close = torch.allclose(own_grad.float(), grad.float(), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    norms.append([torch.equal(own_out, out), out.dtype == dtype, grad.dtype == dtype, close, list(norm.state_dict())])
print(json.dumps([told, own, used, norms]))
"""


def _probe(path: Path) -> list:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return list(json.loads(found.stdout.splitlines()[-1]))


def test_a_process_that_finds_apex_uses_it_on_its_devices_only() -> None:
    told, own, used, norms = _probe(STAND_IN)
    assert told[0] == "AdamW and norms: PyTorch's (NVIDIA's Apex has kernels for CUDA only)"
    assert told[1] == "AdamW: FusedAdam of NVIDIA Apex; norms: FusedRMSNorm of NVIDIA Apex"
    assert (own, used) == ("torch.optim.adamw", "apex.optimizers")
    # In both types: the same values to the last bit, the types of the input, the same gradient, the same parameters.
    assert norms == [[True, True, True, True, ["weight"]]] * 2


def test_another_package_of_that_name_is_not_taken_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import pyramid_that_is_not_here\n", encoding="utf-8")
    told, _, used, _ = _probe(tmp_path)
    assert told[1] == (
        "AdamW: PyTorch (NVIDIA's Apex with amp_C is not installed); "
        "norms: PyTorch (NVIDIA's Apex with fused_layer_norm_cuda is not installed)"
    )
    assert used == "torch.optim.adamw"
