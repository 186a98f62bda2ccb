"""What the facts mean: what is broken, and what is not here that some command needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mome_dist.assets.registry import ASSETS, FACE_MESH
from mome_dist.diagnosis.facts import CORE, FURTHER, Facts
from mome_dist.extras import EXTRA_OF
from mome_dist.origins import MADE

_ALL = "every command"
# Commands that need a package, where it is not nearly all of them.
_NEEDS = {
    "torch": "all but plan, config and launch",
    "transformers": "train, evaluate, transcribe, verify, export",
    "safetensors": "train, evaluate, transcribe, verify, export",
    "accelerate": "evaluate and transcribe with device_map, fetch",
    "megatron-core": "train, verify, drill, tune",
    "deepspeed": "train, verify, drill, tune",
    "submitit": "launch submitit",
    "hydra-submitit-launcher": "launch submitit --multirun",
    "webdataset": "prepare",
    "jiwer": "evaluate",
    "tensorboard": "train",
    "matplotlib": "report, tune",
    "argcomplete": "completion",
}
_FOR_MODELS = {
    "smollm2-135m": "train experiment=quickstart",
    "whisper-tiny.en": "train experiment=quickstart, experiment=tiny",
    "face-mesh": "prepare lrs3, lrs2, manifests; transcribe of films with a face",
    "tiny": "train experiment=tiny",
    "visemes": "train experiment=quickstart, experiment=tiny",
    "avhubert-base": "train video_encoder=avhubert_base",
    "avhubert-large": "train experiment=lrs3, experiment=lrs2",
    "synthetic corpus": "train experiment=quickstart, experiment=tiny; pretrain",
}
_LEAST_GB = 1.0  # free, below which a place is as good as full


@dataclass(frozen=True)
class Finding:
    """Something that is not as a command needs it.

    Attributes:
        broken: whether it is a fault of the installation; otherwise something that may be added.
        what: there is.
        commands: that suffer.
        fix: what to do.
    """

    broken: bool
    what: str
    commands: str
    fix: str


def judge(facts: Facts) -> list[Finding]:
    """All findings, the faults first."""
    return sorted(_found(facts), key=lambda finding: not finding.broken)


def _found(facts: Facts) -> Iterator[Finding]:
    yield from _packages(facts)
    yield from _gpus(facts)
    yield from _places(facts)
    for name, place in facts.models.items():
        if place is None:
            what = f"{name} is not in the cache"
            yield Finding(False, what, _FOR_MODELS.get(name, "train"), _origin(name))
    if not facts.speech:
        fix = "install flite (apt-get install flite), or pip install 'mome_dist[espeak]'"
        yield Finding(False, "no speech synthesiser", "prepare synthetic", fix)
    if facts.slurm["sbatch"] is None:
        yield Finding(
            False,
            "no sbatch: this machine submits nothing to Slurm",
            "launch slurm, launch submitit",
            "use a login node",
        )


def _packages(facts: Facts) -> Iterator[Finding]:
    for name, version in facts.packages.items():
        if version is None:
            extra = EXTRA_OF.get(FURTHER.get(name, name))
            fix = f"pip install {name}" if extra is None else f"pip install 'mome_dist[{extra}]'"
            yield Finding(name in CORE, f"{name} is not installed", _NEEDS.get(name, _ALL), fix)
    if "error" in facts.torch:
        fix = "install a torch that fits this machine's driver and Python"
        yield Finding(True, f"torch cannot be imported: {facts.torch['error']}", _ALL, fix)
    elif facts.torch and not facts.torch["gloo"]:
        yield Finding(True, "torch has no gloo", "launch", "install a torch that was built with torch.distributed")


def _gpus(facts: Facts) -> Iterator[Finding]:
    if isinstance(facts.driver_gpus, str):
        yield Finding(True, facts.driver_gpus, _ALL, "mend the driver, or hide the GPUs with CUDA_VISIBLE_DEVICES=")
    elif len(facts.driver_gpus) > len(facts.devices):
        what = f"the driver shows {len(facts.driver_gpus)} GPUs, torch sees {len(facts.devices)}"
        yield Finding(True, what, _ALL, "install a torch whose CUDA this driver knows (nvidia-smi names the newest)")
    if len(facts.devices) > 1 and facts.torch.get("nccl") is None:
        yield Finding(
            True, "torch has no NCCL", "launch, on GPUs", "install a torch with NCCL, or MOME_DIST_BACKEND=gloo"
        )


def _places(facts: Facts) -> Iterator[Finding]:
    fixes = {
        "cache": "set MOME_DIST_CACHE",
        "runs": "name another place with output_dir=DIR",
        "temporary": "set TMPDIR",
    }
    for name, place in facts.places.items():
        if not place["writable"]:
            yield Finding(True, f"{place['path']} cannot be written to", _ALL, fixes[name])
        elif place["free_gb"] < _LEAST_GB:
            yield Finding(True, f"{place['path']} has {place['free_gb']} GB left", _ALL, f"{fixes[name]}, or make room")


def _origin(name: str) -> str:
    if name == "synthetic corpus":
        return "mome-dist prepare synthetic"
    if name == FACE_MESH and name not in ASSETS:
        return "Linux on x86-64 with Python 3.11 or 3.12: MediaPipe has no wheel for what this is"
    return MADE.get(name, "run `mome-dist fetch {name}`").format(name=name).removeprefix("run ").replace("`", "")
