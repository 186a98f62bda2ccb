"""The machine as the planner reads it (`--measured`), and what the planner predicts for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.layer_candidates import LayerShape
from mome_dist.cluster.facts import describe_rank
from mome_dist.cluster.rates import measure_rates
from mome_dist.config.load import load_config
from mome_dist.parallel.layout import Layout
from mome_dist.planning.experts import expert_seconds
from mome_dist.planning.job import Candidate, Clip, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.planning.measured import cluster_of_record

TINY_SIDE = 64  # of the products that a rehearsal takes rates from


def cluster_record(device: torch.device, tiny: bool) -> dict[str, Any]:
    """This rank alone, in the form of `mome_dist.cluster.check.check_cluster`."""
    report = describe_rank(device)
    return {
        "device": device.type,
        "gpu": report["hardware"].get("gpu", ""),
        "nodes": 1,
        "ranks_per_node": 1,
        "cores": report["hardware"]["cores"],
        "memory_bytes": report["memory_bytes"],
        "rates": measure_rates(device, TINY_SIDE if tiny else None).record(),
        "grouped_products": report["hardware"].get("grouped_products", False),
        "links": {},
    }


def layer_prediction(shape: LayerShape, tokens: int, record: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds that the planner expects of a MoME module by dispatch, forward and backward."""
    mome = {"routed_experts": shape.experts, "top_k": shape.top_k, "shared_experts": 1, "bottleneck": shape.bottleneck}
    config = load_config([*(f"mome.{key}={value}" for key, value in mome.items()), "llm.precision=bf16"])
    llm = replace(find_shape("llama-3.2-3b"), hidden_size=shape.hidden_size)
    cluster = cluster_of_record(record, "this benchmark")
    job = job_of(config, llm, Clip(), {"audio": 1, "video": 1}, cluster.on_gpu)
    return {
        dispatch: expert_seconds(job, Candidate(Layout.for_world(1), 0, dispatch, 1), cluster, tokens) * 1e3
        for dispatch in ("local", "alltoall")
    }
