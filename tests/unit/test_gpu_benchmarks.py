"""The benchmarks of a GPU, rehearsed on the CPU at tiny sizes; what they read from traces; what is committed."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

# The working parts are imported here once, not in every fork.
from benchmarks.gpu import (
    decode,
    decode_work,
    encoders,
    encoders_work,
    layer,
    layer_work,
    profile,
    profile_work,
    step,
    step_work,
    told,
)
from benchmarks.gpu.models import PAPER, TINY, Sizes, configuration
from benchmarks.gpu.predictions import jobs, predictions, step_checks
from benchmarks.gpu.trace import cpu_trace, gpu_trace
from benchmarks.gpu.training import Training, build_model, engine_of
from benchmarks.results import RESULTS
from mome_dist.errors import UserError
from mome_dist.parallel.forked import run_forked
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.planning.flops import step_flops
from mome_dist.planning.job import Job
from mome_dist.planning.measured import Check

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = {
    "layer": (layer, layer_work),
    "step": (step, step_work),
    "encoders": (encoders, encoders_work),
    "decode": (decode, decode_work),
    "profile": (profile, profile_work),
}


def _rehearsed(benchmark: ModuleType, *arguments: str) -> tuple[int, str]:
    """What a benchmark returns and prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = benchmark.main([*arguments, "--tiny", "--device", "cpu"])
    return code, printed.getvalue()


def _figures(name: str, results: Path, *arguments: str) -> dict[str, Any]:
    """The figures of a rehearsal in a fork of this process, since a benchmark opens a world."""
    given = ["--results", str(results), *arguments]
    ((code, printed),) = run_forked(_rehearsed, 1, BENCHMARKS[name][0], *given)
    assert code == 0
    path = results / f"gpu_{name}.json"
    assert path.with_suffix(".md").read_text() in printed
    stored = json.loads(path.read_text())
    assert stored["command"].startswith(f"python -m benchmarks.gpu.{name} --results")
    return stored["figures"]


def test_the_layer_is_measured_beside_its_peers_and_its_floors(tmp_path: Path) -> None:
    figures = _figures("layer", tmp_path)
    assert len(figures["cases"]) == 2
    for case in figures["cases"]:
        found = case["candidates"]
        peers = {f"transformers {name}" for name in ("eager", "batched_mm", "grouped_mm")} - set(case["failed"])
        floors = {"products of all experts", "products of the chosen experts"}
        assert set(found) == {"deepspeed", "alltoall", "local", "megatron allgather"} | peers | floors
        assert all(0 < each["least"] <= each["milliseconds"] <= each["most"] for each in found.values())
        # Router, gates and bookkeeping are what a layer has beyond two products.
        assert found["local"]["kernels"] > found["products of all experts"]["kernels"]
        assert max(found["local"]["differs"].values()) < layer.DIFFERENCE
        assert found["local"]["predicted"] > 0 and found["deepspeed"]["predicted"] is None
        # Rows of four units are eight bytes, which grouped products do not take.
        assert set(case["failed"]) == ({"transformers grouped_mm"} if case["bottleneck"] % 8 else set())
    # Times are a matter of chance here: these are not.
    for name, times in {"deepspeed": 8.0, "local": 2.0, "alltoall": 3.0, "products of all experts": 1.6}.items():
        found[name] |= {"milliseconds": times, "busy": times / 2}
    assert layer.ratios(case) == pytest.approx({"deepspeed": 4, "floor": 1.25, "busy floor": 1.25})
    figures["cluster"]["device"] = "cuda"
    assert [line.partition(":")[0] for line in layer.summary(figures)[2:]] == ["- met", "- met", "- met"]
    # A peer that does not run is told.
    figures["cases"][1]["failed"] = {"megatron alltoall": "RuntimeError: no\nstreams"}
    assert layer.render(figures)[-1] == "Does not run here: megatron alltoall (RuntimeError: no streams)."


def test_a_step_is_measured_in_three_forms_and_predicted(tmp_path: Path) -> None:
    figures = _figures("step", tmp_path, "--graphs")
    _check_step(figures)
    (graphed,) = figures["graphed"].values()
    assert graphed["tokens"] == figures["cases"]["with MoME"]["tokens"] and graphed["step"] > 0
    assert "layers in CUDA graphs" in (tmp_path / "gpu_step.md").read_text()
    # Predictions are made anew from what is stored.
    stored = json.loads((tmp_path / "gpu_step.json").read_text())
    for case in stored["figures"]["cases"].values():
        case["predicted"]["seconds"] = 0.0
    (tmp_path / "gpu_step.json").write_text(json.dumps(stored))
    assert _figures("step", tmp_path, "--predict") == figures
    _check_that_plans_are_checked(figures, tmp_path)


def _check_that_plans_are_checked(figures: dict[str, Any], folder: Path) -> None:
    """One that is right, one that is off."""
    for case in figures["cases"].values():
        case["step"], case["bytes"] = case["predicted"]["seconds"] * 1e3, case["predicted"]["bytes"]
    figures["planned"] = step_checks(figures["cases"])
    (folder / "right").mkdir()
    _check_plan(figures, TINY, folder / "right")
    case["bytes"] *= 0.8
    figures["planned"] = step_checks(figures["cases"])
    (folder / "wrong").mkdir()
    with pytest.raises(AssertionError, match=r"tensors, with MoME and encoders: .* \(\+25%\)"):
        _check_plan(figures, TINY, folder / "wrong")


def _check_step(figures: dict[str, Any]) -> None:
    figures = copy.deepcopy(figures)
    plain, mome, whole = figures["cases"].values()
    for case in (plain, mome, whole):
        assert sum(case["milliseconds"].values()) == pytest.approx(case["step"], rel=1e-6)
        assert case["tokens"] == plain["tokens"] > 0 and case["predicted"]["bytes"] > 0
    assert plain["kernels"] < mome["kernels"] < whole["kernels"]
    needed = [case["predicted"]["flops"] for case in (plain, mome, whole)]
    assert [bool(each["experts"]) for each in needed] == [False, True, True]
    assert [bool(each["encoders"]) for each in needed] == [False, False, True]
    assert step.utilisation(figures, mome) is None, "no CPU has a published peak"
    # A step that takes a second and needs half of what the GPU does in one.
    figures["peak flops"], whole["step"] = 2 * sum(needed[2].values()), 1000.0
    assert step.utilisation(figures, whole) == 0.5


def _counted(folder: Path) -> tuple[list[dict[str, int]], list[Job]]:
    """FLOPs that torch counts of a step without MoME and with it, by operation; and the planner's jobs."""
    config, cpu, counts = configuration(TINY, folder), torch.device("cpu"), []
    with parallel_world(Layout.for_world(1), 0, timeout_seconds=60):
        for with_mome in (False, True):
            model = build_model(config, with_mome, cpu)
            training = Training(config, TINY, model, engine_of(config, model), {}, cpu)
            with FlopCounterMode(display=False) as counter:
                training.step()
            counts.append({str(name): count for name, count in counter.get_flop_counts()["Global"].items()})
    return counts, list(jobs(config, TINY).values())[:2]


def test_flops_of_a_step_are_those_that_torch_counts(tmp_path: Path) -> None:
    (((plain, with_mome), (frozen, mome)),) = run_forked(_counted, 1, tmp_path)
    tokens, layers, hidden = sum(mome.lengths) * mome.batch_size, mome.shape.layers, mome.shape.hidden_size
    needed = step_flops(frozen)
    # The eager attention of a CPU computes keys that a token does not see, too.
    attention = plain["aten.bmm"] / 2
    # Of the projectors, the first map has no gradient of its input: five products, of which two are forward.
    projectors = 2.5 * plain["aten.addmm"]
    assert needed["llm"] + attention + projectors == sum(plain.values())
    # This form computes all experts; and their output biases, weighted by the gates, are a product as well.
    everywhere = step_flops(replace(mome, top_k=mome.experts))["experts"]
    biases = 6 * tokens * layers * (mome.experts + mome.shared) * hidden
    # So are the sums over the tokens of each view: of scores, there and back, and of routes.
    sums = 6 * len(mome.lengths) * tokens * layers * mome.experts
    assert everywhere + biases + sums == sum(with_mome.values()) - sum(plain.values())
    assert step_flops(mome)["experts"] < everywhere and step_flops(mome)["llm"] == needed["llm"]


def test_encoders_are_compared_with_float64_in_every_precision(tmp_path: Path) -> None:
    figures = _figures("encoders", tmp_path)
    assert set(figures["encoders"]) == {"audio", "video"} and figures["spectrogram"]["host"] > 0
    for precisions in figures["encoders"].values():
        assert 0 < precisions["fp32"]["error"] < 1e-5 < precisions["bf16"]["error"] < 5e-2
        assert set(precisions) == {"fp32", "TF32", "bf16", "as torch has it"}


def test_decoding_is_measured_with_mome_and_without(tmp_path: Path) -> None:
    figures = _figures("decode", tmp_path)
    assert [(each["clips"], each["beams"]) for each in figures["speed"][::2]] == [(1, 1), (8, 1), (1, 15)]
    assert {each["model"] for each in figures["speed"]} == {"LLM", "with MoME"}
    assert all(0 < each["tokens"] <= figures["tokens"] * each["clips"] for each in figures["speed"])
    assert len(figures["parity"]) == 8 and all(each["equal"] == each["clips"] for each in figures["parity"])


def test_a_profile_sums_up_its_trace(tmp_path: Path) -> None:
    figures = _figures("profile", tmp_path, "--trace")
    assert json.loads((tmp_path / "gpu_profile_trace.json").read_text())["traceEvents"]
    seconds = [each["seconds"] for each in figures["kernels"]]
    assert seconds == sorted(seconds, reverse=True)
    assert figures["busy"] <= sum(seconds) * 1.001 and 0 < figures["idle share"] < 1


def _event(category: str, name: str, start: float, length: float, correlation: int | None = None) -> dict[str, Any]:
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": 1, "args": arguments}


def test_a_trace_tells_why_a_gpu_was_idle() -> None:
    """Three kernels in 100 us: 20 us of nothing because Python came late, 10 us although it had asked in time."""
    events = [
        _event("cuda_runtime", "cudaLaunchKernel", 0, 2, 1),
        _event("kernel", "product", 10, 30, 1),
        _event("gpu_memcpy", "copy", 20, 20, 2),  # beside it
        _event("cuda_runtime", "cudaMemcpyAsync", 3, 2, 2),
        _event("cuda_runtime", "cudaLaunchKernelExC", 60, 2, 3),
        _event("kernel", "product", 70, 20, 3),  # 30 us of nothing before it, of which it was asked for after 20
        _event("cuda_driver", "cuLaunchKernel", 62, 2, 4),
        _event("kernel", "norm", 90, 20, 4),
        _event("gpu_user_annotation", "step", 0, 200),
        {"ph": "M", "name": "process_name"},
    ]
    trace = gpu_trace(events)
    assert [kernel.name for kernel in trace.kernels] == ["product", "copy", "product", "norm"]
    assert trace.span == pytest.approx(100e-6) and trace.busy == pytest.approx(70e-6)
    assert trace.idle_share == pytest.approx(0.3) and trace.host_share == pytest.approx(0.2)
    assert {name: sum(each) for name, each in trace.by_name().items()} == pytest.approx(
        {"product": 50e-6, "copy": 20e-6, "norm": 20e-6}
    )


def test_on_a_cpu_the_innermost_operations_count() -> None:
    events = [
        _event("cpu_op", "aten::linear", 0, 10),
        _event("cpu_op", "aten::addmm", 1, 8),
        _event("cpu_op", "aten::add", 20, 5),
        _event("python_function", "forward", 0, 30),
    ]
    trace = cpu_trace(events)
    assert [kernel.name for kernel in trace.kernels] == ["aten::addmm", "aten::add"]
    assert trace.busy == pytest.approx(13e-6) and trace.host_share == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda", "--tiny"], r"torch \S+ sees no GPU \(--device cuda\): "),
        ([], r"torch \S+ sees no GPU \(--device cuda\): "),
        (["--device", "cpu"], r"torch \S+ sees no GPU \(--device cpu\): "),
        (["--tiny", "--results", str(RESULTS)], "--tiny: its figures mean nothing"),
        (["--predict"], r"--predict: \S+gpu_step.json does not exist: measure"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert step.main(["--results", str(tmp_path), *arguments]) == 2
    assert re.fullmatch(f"error: {words}.*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_readme_tells_what_was_run_on_a_gpu_and_what_was_not() -> None:
    (part,) = told.PART.findall(told.PAGE.read_text(encoding="utf-8"))
    assert part == told.told(RESULTS), "run: python -m benchmarks.gpu.told"
    assert (part == told.NOTHING) == (not list(RESULTS.glob("gpu_*.json")))


def test_a_rehearsal_is_not_told_as_a_measurement(tmp_path: Path) -> None:
    _figures("decode", tmp_path)
    with pytest.raises(UserError, match=r"gpu_decode\.json comes from a rehearsal"):
        told.told(tmp_path)
    # The same file, had it come from a GPU: its own lines, and the names of all others.
    path = tmp_path / "gpu_decode.json"
    stored = json.loads(path.read_text())
    stored["machine"] |= {"GPU": "NVIDIA H200", "driver": "1", "CUDA": "13"}
    stored["command"] = "python -m benchmarks.gpu.decode"
    path.write_text(json.dumps(stored))
    lines = told.told(tmp_path).splitlines()
    assert "NVIDIA H200" in lines[0] and lines[2:4] == decode.summary(stored["figures"])
    assert lines[-1] == "Not run on a GPU yet: step, layer, profile, encoders."


def _check_plan(figures: dict[str, Any], sizes: Sizes, folder: Path) -> None:
    """The predictions are those of today's planner, and not far off."""
    today = predictions(sizes, figures["cluster"], folder)
    for form, case in figures["cases"].items():
        assert case["predicted"] == today[form], "run: python -m benchmarks.gpu.step --predict"
    assert figures["planned"] == step_checks(figures["cases"])
    for check in (Check(**each) for each in figures["planned"]):
        assert abs(check.error) <= {"GB": 0.10, "ms": 0.25}[check.unit], str(check)


def test_committed_plans_of_a_gpu_hold_what_is_aimed_at(tmp_path: Path) -> None:
    for path in RESULTS.glob("gpu_step.json"):
        _check_plan(json.loads(path.read_text())["figures"], PAPER, tmp_path)
