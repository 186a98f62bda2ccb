"""The planner's arithmetic against closed forms and against what is built; the files it writes are read back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mome_dist.commands import plan as plan_layout
from mome_dist.config import load_config
from mome_dist.config.deepspeed.file import deepspeed_of
from mome_dist.config.schema import ParallelConfig
from mome_dist.errors import UserError
from mome_dist.llm.shape import LLMShape
from mome_dist.parallel.layout import Layout
from mome_dist.planning.experts import expert_seconds
from mome_dist.planning.flops import step_flops
from mome_dist.planning.hardware import GPUS, Cluster, Link, cluster_of_gpus, known_gpu
from mome_dist.planning.job import Candidate, Clip, Job, job_of
from mome_dist.planning.llms import LLMS, find_shape
from mome_dist.planning.measured import measured_cluster
from mome_dist.planning.memory import memory
from mome_dist.planning.search import predict, search
from mome_dist.planning.speed import all_reduce, step_time
from mome_dist.planning.write import deepspeed_settings, write_parallel
from mome_dist.speech.views import View

WIDTHS = {"audio": 384, "video": 128}
NODE = cluster_of_gpus("h100", 1, 8)


def _job(llm: str = "llama-3.1-8b", **changes: object) -> Job:
    config = load_config(["mome.routed_experts=24", "data.batch_size=64"])
    return replace(job_of(config, find_shape(llm), Clip(), WIDTHS, on_gpu=True), **changes)  # type: ignore[arg-type]


def _candidate(
    world: int = 8, zero: int = 1, dispatch: str = "gather", accumulation: int = 1, **axes: Any
) -> Candidate:
    return Candidate(Layout.for_world(world, **axes), zero, dispatch, accumulation)


@pytest.mark.parametrize(
    ("name", "billions"),
    # As the models' cards say, output embeddings that are tied to the input counted once.
    [("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.6), ("llama-3.1-405b", 405.9), ("llama-2-7b", 6.74)],
)
def test_sizes_of_well_known_models(name: str, billions: float) -> None:
    assert _job(name).frozen_parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_a_budget_of_frames_is_so_many_clips_and_need_not_divide() -> None:
    config = load_config(["mome.routed_experts=24", "data.batch_size=null", "data.max_frames=9900"])
    job = job_of(config, find_shape("llama-3.1-8b"), Clip(seconds=6), WIDTHS, on_gpu=True)
    assert (job.batch_size, job.fixed_batch) == (66, False)
    assert job.accumulations(8) == [1, 2, 4, 8] and job.accumulations(66) == [1] and job.accumulations(67) == []
    assert replace(job, fixed_batch=True).accumulations(8) == []
    assert _candidate(accumulation=2).utterances(job) == 5  # of the fullest rank: 66 over 16 parts
    assert any(plan.candidate.layout.dp == 8 for plan in search(job, NODE).plans)


def test_frozen_weights_take_two_bytes_and_no_optimiser_state() -> None:
    job = _job()
    need = memory(job, _candidate(), 0)
    assert need.frozen == 2 * job.frozen_parameters
    # AdamW in fp32 over what trains, and over nothing else: experts divided over all eight ranks.
    local = job.trained_parameters - 32 * 24 * job.expert_parameters * 7 / 8
    need = memory(job, _candidate(zero=0, ep=8), 0)
    assert (need.trained, need.gradients, need.moments) == (4 * local, 4 * local, 8 * local)


def test_zero_divides_the_optimiser_state_over_the_ranks_that_hold_the_same() -> None:
    job = _job(projectors_train=False)
    experts = 32 * 24 * job.expert_parameters
    shared = job.trained_parameters - experts
    need = memory(job, _candidate(ep=4), 0)
    held = shared / 8 + experts / 4 / 2  # four ranks share the experts, two have the same ones
    assert need.moments == pytest.approx(8 * held)
    assert need.trained == pytest.approx(4 * (shared + experts / 4) + 4 * held)


def test_a_stage_keeps_the_microbatches_in_flight() -> None:
    job = _job(lengths=(100,), shares=(1.0,), longest=(100,))
    candidate = _candidate(world=4, pp=4, dispatch="local", accumulation=8)
    kept = [memory(job, candidate, stage).experts for stage in range(4)]
    assert kept == pytest.approx([kept[3] * n for n in (4, 3, 2, 1)])
    few = memory(job, replace(candidate, accumulation=2), 0).experts  # two microbatches, of four times the clips
    assert few == pytest.approx(2 * memory(job, replace(candidate, accumulation=2), 3).experts)


def test_drawn_rates_are_every_pair_in_the_mean_and_the_longest_at_most() -> None:
    def job(*overrides: str) -> Job:
        config = load_config(["mome.routed_experts=24", "task.views_per_step=null", *overrides])
        return job_of(config, find_shape("llama-3.1-8b"), Clip(), WIDTHS, on_gpu=True)

    drawn, pairs = job("task=omni"), []
    for audio, video in ((4, 2), (4, 5), (16, 2), (16, 5)):
        rates = [f"task.{task}_audio_rates=[{audio}]" for task in ("asr", "avsr")]
        pairs.append(job("task=all", *rates, *(f"task.{task}_video_rates=[{video}]" for task in ("vsr", "avsr"))))
    assert (drawn.views_per_step, len(drawn.lengths)) == (3, 8)
    for part, flops in step_flops(drawn).items():
        assert flops == pytest.approx(sum(step_flops(pair)[part] for pair in pairs) / 4), part
    candidate = _candidate()
    assert memory(drawn, candidate, 0).total == pytest.approx(memory(pairs[0], candidate, 0).total)
    tokens = [sum(tokens for _, tokens in candidate.mean_pass(each)) for each in (drawn, *pairs)]
    assert tokens[0] == pytest.approx(sum(tokens[1:]) / 4)


def test_recomputation_and_sequence_parallelism_keep_less() -> None:
    job = _job(attention="eager")
    whole, selective, full = (
        memory(job, Candidate(Layout.for_world(8, tp=2, recompute=way), 1, "local", 1), 0).total
        for way in ("none", "selective", "full")
    )
    split = memory(job, Candidate(Layout.for_world(8, tp=2, sequence_parallel=True), 1, "local", 1), 0).total
    assert full < selective < whole and split < whole


def test_tensor_parallelism_divides_products_and_nothing_else() -> None:
    job = _job("llama-3.1-70b")
    one, eight = (memory(job, _candidate(tp=tp, dispatch="local"), 0).frozen for tp in (1, 8))
    norms = 2 * 8192 * (2 * 80 + 1)
    assert eight - norms == pytest.approx((one - norms) / 8)


def test_all_reduce_is_a_scatter_and_a_gather() -> None:
    link = Link(1e9, 1e-6)
    assert all_reduce(4e9, 4, link) == pytest.approx(2 * (3 + 2e-6))
    assert all_reduce(4e9, 1, link) == 0


def test_more_microbatches_fill_the_pipeline() -> None:
    job = _job(lengths=(400,), shares=(1.0,), longest=(400,))
    waits = []
    for accumulation in (1, 4, 16):
        time = step_time(job, _candidate(world=4, pp=4, dispatch="local", accumulation=accumulation), NODE)
        waits.append(time.waiting / time.total)
    assert waits[0] > waits[1] > waits[2]


def test_processes_that_share_cores_wait_for_them() -> None:
    job, candidate = _job(), _candidate(dispatch="local")
    own, shared = (step_time(job, candidate, replace(NODE, workers=workers)) for workers in (8, 4))
    # Half of the ranks compute while the others wait.
    assert own.waiting == 0
    assert shared.waiting == pytest.approx(shared.products + shared.passes + shared.experts)


def test_the_search_finds_what_fits_and_says_why_others_do_not() -> None:
    found = search(_job("llama-3.1-70b"), NODE)
    assert all(plan.memory.total <= NODE.memory for plan in found.plans)
    seconds = [round(plan.time.total, 5) for plan in found.plans]  # equally fast ones are in order of memory
    assert seconds == sorted(seconds)
    assert found.plans[0].candidate.layout.tp * found.plans[0].candidate.layout.pp > 1, "141 GB do not fit one GPU"
    reasons = [rejection.reason for rejection in found.rejections]
    assert any("may use" in reason for reason in reasons)
    best = found.plans[0]
    assert predict(_job("llama-3.1-70b"), best.candidate, NODE) == best


def test_layouts_that_the_model_refuses_are_named() -> None:
    reasons = {r.reason for r in search(_job("qwen2.5-0.5b"), NODE).rejections}
    assert any(reason.startswith("parallel.tp=8 does not divide the LLM's 14 attention heads") for reason in reasons)
    assert any("does not divide mome.routed_experts" in r.reason for r in search(_job(experts=23), NODE).rejections)


def test_nothing_fits() -> None:
    with pytest.raises(UserError, match=r"no layout of 1 x 8 H100 .* fits: needs more than the 73.6 GB"):
        search(_job("llama-3.1-405b"), NODE)


def test_written_files_are_those_that_runs_read(tmp_path: Path) -> None:
    candidate = Candidate(Layout.for_world(16, 2, 2, 4, sequence_parallel=True, recompute="full"), 2, "gather", 4)
    write_parallel(candidate, tmp_path / "planned.yaml", "A plan.")
    text = (tmp_path / "planned.yaml").read_text()
    assert all("# " in line for line in text.splitlines()), "every key is commented"
    merged = OmegaConf.merge(OmegaConf.structured(ParallelConfig), OmegaConf.load(tmp_path / "planned.yaml"))
    assert OmegaConf.to_object(merged) == ParallelConfig(
        tp=2, pp=2, ep=4, sequence_parallel=True, recompute="full", timeout_seconds=600
    )
    assert deepspeed_settings(candidate)["zero_optimization"]["stage"] == 2


def test_json_output_and_files_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpu", "a100-80gb", "--llm", "llama-3.1-8b", "--json", "--top", "3", "mome.routed_experts=8"]
    files = ["--write-parallel", str(tmp_path / "p.yaml"), "--write-deepspeed", str(tmp_path / "d.json")]
    assert plan_layout.main([*words, *files, "data.batch_size=32"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["plans"]) == 3 and record["cluster"]["ranks_per_node"] == 8
    best = record["plans"][0]
    assert json.loads((tmp_path / "d.json").read_text()) == best["deepspeed"]
    assert sum(value for name, value in best["seconds"].items() if name != "total") == pytest.approx(
        best["seconds"]["total"]
    )


def test_a_written_plan_is_run_with_the_words_that_are_printed(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--gpu", "a100-80gb", "--llm", "llama-3.1-8b", "mome.routed_experts=8", "data.batch_size=32"]
    found = []
    for folder in (configs, tmp_path / "elsewhere"):
        layout, deepspeed = folder / "parallel" / "planned.yaml", folder / "deepspeed" / "planned.json"
        deepspeed.parent.mkdir(parents=True, exist_ok=True)
        layout.parent.mkdir(exist_ok=True)
        assert plan_layout.main([*words, "--write-parallel", str(layout), "--write-deepspeed", str(deepspeed)]) == 0
        said = capsys.readouterr().out.rpartition("run it with: ")[2].split()
        assert ("parallel=planned" in said) == ("deepspeed=planned" in said) == (folder == configs)
        config = load_config(["experiment=tiny", *said])
        found.append((config.parallel, config.data.accumulation, deepspeed_of(config).acts))
        assert found[-1][2] == json.loads(deepspeed.read_text())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name the machine"),
        (["--gpu", "voodoo"], "known are"),
        (["--gpu", "h100", "--nodes", "0"], "--nodes 0"),
        (["--gpu", "h100", "--llm", "gpt-5"], "neither a directory"),
        (["--measured", "missing.json"], "missing.json"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_layout.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_measurement_for_other_sizes(tmp_path: Path) -> None:
    link = {"bytes_per_second": 1e9, "latency": 1e-4}
    record = {
        "device": "cpu",
        "nodes": 2,
        "ranks_per_node": 2,
        "cores": 2,
        "memory_bytes": 20e9,
        "rates": {"bf16_flops": 1e11, "fp32_flops": 5e10, "memory_bytes": 1e10, "call": 1e-6},
        "links": {"inside": link},
    }
    (tmp_path / "cluster.json").write_text(json.dumps(record))
    cluster = measured_cluster(tmp_path / "cluster.json", 1, 4)
    assert (cluster.ranks, cluster.workers) == (4, 2)
    assert cluster.between == cluster.inside == Link(1e9, 1e-4)
    assert cluster.memory == pytest.approx(20e9 * 0.92 / 4)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 NVL", None),  # another peak than the H100 of the table
        ("NVIDIA L4", None),
        ("", None),
    ],
)
def test_the_name_that_a_driver_gives_a_gpu(driver: str, name: str | None) -> None:
    assert known_gpu(driver) == name


def _benchmarked(path: Path, gpu: str) -> Path:
    """Results of a benchmark of one GPU."""
    cluster = {
        "device": "cuda",
        "gpu": gpu,
        "nodes": 1,
        "ranks_per_node": 1,
        "cores": 16,
        "memory_bytes": 150e9,
        "rates": {"bf16_flops": 7e14, "fp32_flops": 5e13, "memory_bytes": 4e12, "call": 5e-6},
        "grouped_products": True,
        "links": {},
    }
    planned = [{"what": "a step, with MoME", "unit": "ms", "predicted": 330.0, "measured": 300.0}]
    path.write_text(json.dumps({"command": "", "machine": {}, "figures": {"cluster": cluster, "planned": planned}}))
    return path


def test_a_gpu_that_was_measured_alone_makes_a_cluster_with_public_links(tmp_path: Path) -> None:
    path = _benchmarked(tmp_path / "gpu_step.json", "NVIDIA H200")
    alone, node = measured_cluster(path), measured_cluster(path, 2, 8)
    public = cluster_of_gpus("h200", 2, 8)
    assert (node.ranks, node.bf16_flops, node.call, node.grouped_products) == (16, 7e14, 5e-6, True)
    assert (node.inside, node.between) == (public.inside, public.between)
    assert alone.inside.latency == 0 and alone.memory == node.memory == pytest.approx(150e9 * 0.92)
    unknown = _benchmarked(tmp_path / "gpu_step.json", "Some GPU")
    assert measured_cluster(unknown).ranks == 1
    with pytest.raises(UserError, match=r"--measured gpu_step\.json: .* tells nothing of links") as problem:
        measured_cluster(unknown, 1, 8)
    assert "is no measurement" not in str(problem.value)


def test_a_plan_says_how_far_plans_were_off_on_the_measured_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--measured", str(_benchmarked(tmp_path / "gpu_step.json", "NVIDIA H200")), "--ranks-per-node", "8"]
    words += ["--llm", "llama-3.2-3b", "mome.routed_experts=24"]
    assert plan_layout.main(words) == 0
    assert "measured there, a step, with MoME: 300 ms measured, 330 predicted (+10%)" in capsys.readouterr().out
    assert plan_layout.main([*words, "--json"]) == 0
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert check["error"] == pytest.approx(0.1)


def test_the_cheaper_dispatch_is_the_one_that_was_measured(tmp_path: Path) -> None:
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    measured = json.loads((results / "plan_layout.json").read_text())["figures"]["rates"]
    record = {"device": "cpu", "nodes": 1, "ranks_per_node": 2, "cores": 2, "memory_bytes": 20e9, **measured}
    (tmp_path / "cluster.json").write_text(json.dumps(record))
    decided = set()
    for case in json.loads((results / "moe_layer_bf16.json").read_text())["figures"]:
        processes, weights = case["processes"], "gather" if case["processes"] > 1 else "local"
        if processes > 2:  # more than cores: what they do in turns is no dispatch's cost
            continue
        took = {name: case["candidates"][name]["milliseconds"] for name in ("alltoall", weights)}
        job = _job(precision="bf16", experts=case["experts"], bottleneck=case["bottleneck"], top_k=4, shared=1)
        job = replace(job, shape=replace(job.shape, hidden_size=case["hidden_size"]))
        cluster = measured_cluster(tmp_path / "cluster.json", 1, processes)
        ways = {name: _candidate(processes, dispatch=name, ep=processes) for name in took}
        predicted = {name: expert_seconds(job, way, cluster, 704) for name, way in ways.items()}
        chosen, best = (min(seconds, key=seconds.__getitem__) for seconds in (predicted, took))
        assert took[chosen] < 1.25 * took[best], case
        if took[best] * 1.25 <= max(took.values()):
            decided.add((processes, best))
    assert decided >= {(1, "alltoall"), (2, "alltoall"), (2, "gather")}, "the table decides too little to test anything"


def test_no_part_of_an_experts_cost_but_its_work_grows_with_their_number() -> None:
    def seconds(experts: int, cluster: Cluster, **changes: Any) -> float:
        job = _job(experts=experts, bottleneck=0, precision="bf16")  # nothing to compute or to move but the router's
        return expert_seconds(job, _candidate(8, **changes), replace(cluster, fp32_flops=1e30, memory_bytes=1e30), 1e3)

    for way in ({"dispatch": "local"}, {"dispatch": "alltoall"}, {"dispatch": "alltoall", "ep": 8}):
        assert seconds(8, NODE, **way) == pytest.approx(seconds(48, NODE, **way), rel=1e-6)
    older = cluster_of_gpus("a100-80gb", 1, 8)  # where a grouped product is a loop over its groups
    assert seconds(48, older, dispatch="alltoall") > seconds(8, older, dispatch="alltoall")
    few, many = (step_time(_job(experts=n, bottleneck=1), _candidate(dispatch="local"), NODE) for n in (8, 48))
    assert many.optimizer < 2 * few.optimizer  # as many tensors, of more numbers


def test_clips_have_the_lengths_of_real_sequences() -> None:
    clip = Clip(seconds=4.0, text_tokens=10, prompt_tokens=5)
    assert clip.length(View("avsr", 4, 2)) == 1 + 4 + 50 + 50 + 5 + 10
    assert clip.length(View("vsr", None, 5)) == 1 + 2 + 20 + 5 + 10


def test_tables_are_complete() -> None:
    assert all(gpu.bf16_flops > gpu.fp32_flops and gpu.inside >= gpu.between for gpu in GPUS.values())
    for shape in LLMS.values():
        assert isinstance(shape, LLMShape) and shape.heads % shape.kv_heads == 0


def test_a_plan_needs_no_torch() -> None:
    code = "import mome_dist.planning.command, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
