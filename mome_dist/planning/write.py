"""A plan as files that users run and edit: a layout for `configs/parallel`, and a plain DeepSpeed JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mome_dist.config.deepspeed_keys import BUCKET_ELEMENTS
from mome_dist.files import write_json, write_text
from mome_dist.planning.job import Candidate

# The comments of configs/parallel, so that a written file reads like those that ship.
COMMENTS = {
    "tp": "tensor parallel ranks",
    "pp": "pipeline stages",
    "ep": "expert parallel ranks, inside the data-parallel ones",
    "virtual": "model chunks of a pipeline rank; more than 1: interleaved schedule",
    "stage_layers": "layers of each of the pp x virtual stages, in layer order; null: evenly",
    "sequence_parallel": "split hidden states over the tensor parallel ranks between products",
    "recompute": "activations computed again in the backward pass: none, selective (attention) or full",
    "timeout_seconds": "a collective that takes longer ends the run",
}
TIMEOUT_SECONDS = 600


def write_parallel(candidate: Candidate, path: Path, heading: str) -> None:
    """Write the layout as a file of the Hydra group ``parallel``; ``heading`` becomes its first comment."""
    layout = candidate.layout
    values = {
        "tp": layout.tp,
        "pp": layout.pp,
        "ep": layout.ep,
        "virtual": layout.virtual,
        "stage_layers": "null" if layout.stage_layers is None else list(layout.stage_layers),
        "sequence_parallel": str(layout.sequence_parallel).lower(),
        "recompute": layout.recompute,
        "timeout_seconds": TIMEOUT_SECONDS,
    }
    lines = [f"{f'{key}: {value}':<34} # {COMMENTS[key]}" for key, value in values.items()]
    write_text(path, "\n".join([f"# {heading}", *lines]) + "\n")


def deepspeed_settings(candidate: Candidate) -> dict[str, Any]:
    """A plain DeepSpeed configuration with the candidate's ZeRO stage."""
    if not candidate.zero:
        return {"zero_optimization": {"stage": 0}}
    zero = {"stage": candidate.zero, "reduce_bucket_size": BUCKET_ELEMENTS, "overlap_comm": False}
    return {"zero_optimization": zero}


def write_deepspeed(candidate: Candidate, path: Path) -> None:
    """Write `deepspeed_settings`."""
    write_json(path, deepspeed_settings(candidate))


def overrides(candidate: Candidate) -> list[str]:
    """The settings of a plan that are in neither file, as Hydra overrides."""
    return [f"data.accumulation={candidate.accumulation}", f"mome.dispatch={candidate.dispatch}"]
