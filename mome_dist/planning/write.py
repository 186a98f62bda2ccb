"""A plan as files that users run and edit: a layout for `configs/parallel`, and a plain DeepSpeed JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mome_dist.config.deepspeed.keys import BUCKET_ELEMENTS
from mome_dist.files import write_text
from mome_dist.paths import configs_dir
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


def write_parallel(candidate: Candidate, path: Path, heading: str) -> list[str]:
    """Write the layout as a file of the Hydra group ``parallel``; ``heading`` becomes its first comment.

    Returns:
        The overrides with which a run uses it: the file's name if Hydra finds it there, else its values.
    """
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
    found = path.suffix == ".yaml" and path.resolve().parent == (configs_dir() / "parallel").resolve()
    return [f"parallel={path.stem}"] if found else layout_overrides(candidate)


def deepspeed_settings(candidate: Candidate) -> dict[str, Any]:
    """A plain DeepSpeed configuration with the candidate's ZeRO stage."""
    if not candidate.zero:
        return {"zero_optimization": {"stage": 0}}
    zero = {"stage": candidate.zero, "reduce_bucket_size": BUCKET_ELEMENTS, "overlap_comm": False}
    return {"zero_optimization": zero}


def layout_overrides(candidate: Candidate) -> list[str]:
    """The layout of a plan, as Hydra overrides."""
    layout = candidate.layout
    values = [f"parallel.tp={layout.tp}", f"parallel.pp={layout.pp}", f"parallel.ep={layout.ep}"]
    values += ["parallel.sequence_parallel=true"] if layout.sequence_parallel else []
    return values + ([f"parallel.recompute={layout.recompute}"] if layout.recompute != "none" else [])


def overrides(candidate: Candidate) -> list[str]:
    """The settings of a plan that are in neither file, as Hydra overrides."""
    dispatch = [] if candidate.dispatch == "none" else [f"mome.dispatch={candidate.dispatch}"]
    return [f"data.accumulation={candidate.accumulation}", *dispatch]
