"""What is here: versions, devices, programs, places, models. Values of the environment are told by name only where
they hold no secret; of tokens it is told whether they are set."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mome_dist
from mome_dist.assets import ASSETS, asset_dir
from mome_dist.assets.registry import FACE_MESH
from mome_dist.config.speech_backends import installed_backends
from mome_dist.config.synthetic import SyntheticSettings, default_corpus_dir
from mome_dist.errors import UserError, first_line
from mome_dist.launchers.environment import usable_cores
from mome_dist.launchers.gpus import visible_gpus
from mome_dist.origins import MADE
from mome_dist.paths import cache_root, configs_dir
from mome_dist.versions import UNKNOWN, version_of

# By distribution: a module of it. The first are those that every command needs.
CORE = {
    "hydra-core": "hydra",
    "omegaconf": "omegaconf",
    "PyYAML": "yaml",
    "huggingface_hub": "huggingface_hub",
    "tokenizers": "tokenizers",
    "rich": "rich",
    "numpy": "numpy",
    "soundfile": "soundfile",
    "av": "av",
    "opencv-python-headless": "cv2",
}
FURTHER = {
    "torch": "torch",
    "megatron-core": "megatron",
    "deepspeed": "deepspeed",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "accelerate": "accelerate",
    "submitit": "submitit",
    "hydra-submitit-launcher": "hydra_plugins",
    "webdataset": "webdataset",
    "jiwer": "jiwer",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
    "argcomplete": "argcomplete",
}
OPTIONAL = {
    "triton": "triton",
    "wandb": "wandb",
    "peft": "peft",
    "nvidia-ml-py": "pynvml",
    "espeakng-loader": "espeakng_loader",
}
PROGRAMS = ("flite", "ffmpeg", "git", "make", "apptainer")
SLURM = ("sbatch", "srun", "scontrol", "squeue", "sacct")
SAID = (
    "MOME_DIST_CACHE",
    "MOME_DIST_BACKEND",
    "MOME_DIST_INTERFACE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "DS_ACCELERATOR",
    "TMPDIR",
)
TOKENS = ("HF_TOKEN", "WANDB_API_KEY")


@dataclass
class Facts:
    """What was found, as JSON can hold it; a package or program that is not there is None.

    Attributes:
        versions: of this project, Python and the system, and where the first two are.
        packages, optional: versions by name.
        torch: what it was built for, and what it has of collectives; an ``error`` where it cannot be imported.
        devices: GPUs that torch sees, each with its memory in GB.
        driver_gpus: GPUs that the driver shows to a process, which torch may not see; a text where it does not answer.
        apex: what NVIDIA's Apex is used for.
        cpu: model, cores of this process, and whether it multiplies bf16 in hardware.
        memory: of this machine, and what is free of it, in GB.
        places: cache, runs and temporary files: path, whether they can be written to, free GB.
        models: frozen models and the synthetic corpus, and whether they are in the cache.
        programs, slurm: paths of programs.
        speech: synthesisers for the synthetic corpus.
        environment: variables that matter here; "set" for a token.
    """

    versions: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str | None] = field(default_factory=dict)
    optional: dict[str, str | None] = field(default_factory=dict)
    torch: dict[str, Any] = field(default_factory=dict)
    devices: list[dict[str, Any]] = field(default_factory=list)
    driver_gpus: list[str] | str = field(default_factory=list)
    apex: str = ""
    cpu: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    places: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, str | None] = field(default_factory=dict)
    programs: dict[str, str | None] = field(default_factory=dict)
    slurm: dict[str, str | None] = field(default_factory=dict)
    speech: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def find_facts(environment: Mapping[str, str] = os.environ) -> Facts:
    """Look at everything; imports torch, and changes nothing."""
    facts = Facts(
        versions={
            "mome_dist": mome_dist.__version__,
            "code": str(Path(mome_dist.__file__).parent),
            "configs": str(configs_dir()),
            "python": platform.python_version(),
            "interpreter": sys.executable,
            "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        },
        packages={name: _version(name, module) for name, module in {**CORE, **FURTHER}.items()},
        optional={name: _version(name, module) for name, module in OPTIONAL.items()},
        cpu={"model": _cpu_model(), "cores": usable_cores(), "bf16": None},
        places={
            "cache": place_at(cache_root()),
            "runs": place_at(Path("runs")),
            "temporary": place_at(Path(environment.get("TMPDIR") or "/tmp")),  # noqa: S108  only looked at
        },
        models=_models(),
        programs={name: shutil.which(name) for name in PROGRAMS},
        slurm={name: shutil.which(name) for name in SLURM},
        speech=installed_backends(),
        environment={name: environment[name] for name in SAID if name in environment}
        | {name: "set" for name in TOKENS if environment.get(name)},
    )
    try:
        facts.driver_gpus = visible_gpus(environment)
    except UserError as error:
        facts.driver_gpus = str(error)
    _add_memory(facts)
    _add_torch(facts)
    return facts


def place_at(path: Path) -> dict[str, Any]:
    """A folder: where it is or would be, whether this user may write there, and the free GB."""
    path = path.expanduser().absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return {
        "path": str(path),
        "exists": path.exists(),
        "writable": there.is_dir() and os.access(there, os.W_OK | os.X_OK),
        "free_gb": round(shutil.disk_usage(there).free / 1e9, 1),
    }


def _version(name: str, module: str) -> str | None:
    if find_spec(module) is None:
        return None
    version = version_of(name)
    return "of unknown version" if version == UNKNOWN else version


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _models() -> dict[str, str | None]:
    """By name, the directories of assets and of what commands make; None for what is not there."""
    found: dict[str, str | None] = {}
    for name, asset in ASSETS.items():
        if not asset.for_tests:
            try:
                found[name] = str(asset_dir(name))
            except UserError:
                found[name] = None
    found.setdefault(FACE_MESH, None)  # MediaPipe has no wheel for this Python or this machine
    for name in MADE:
        kind = "llms" if name == "tiny" else "encoders"
        if name not in found:
            made = cache_root() / kind / name
            found[name] = str(made) if (made / "config.json").is_file() else None
    corpus = default_corpus_dir(SyntheticSettings())
    found["synthetic corpus"] = str(corpus) if (corpus / "manifest.json").is_file() else None
    return found


def _add_memory(facts: Facts) -> None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    kilobytes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    facts.memory = {
        "total_gb": round(kilobytes["MemTotal"] * 1024 / 1e9, 1),
        "free_gb": round(kilobytes["MemAvailable"] * 1024 / 1e9, 1),
    }


def _add_torch(facts: Facts) -> None:
    if facts.packages["torch"] is None:
        return
    try:
        import torch
        from torch import distributed
    except (ImportError, OSError) as error:  # a library of another CUDA, or none
        facts.torch = {"error": first_line(error)}
        return
    from mome_dist.llm.precision import cpu_multiplies_bf16
    from mome_dist.nvidia_apex import describe

    built = {"CUDA": torch.version.cuda, "HIP": torch.version.hip}
    nccl = distributed.is_available() and distributed.is_nccl_available() and torch.version.cuda is not None
    facts.torch = {
        "build": next((f"{kind} {version}" for kind, version in built.items() if version), "CPU"),
        "gloo": distributed.is_available() and distributed.is_gloo_available(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts.devices.append(
            {
                "name": device.name,
                "memory_gb": round(device.total_memory / 1e9, 1),
                "capability": f"{device.major}.{device.minor}",
            }
        )
    facts.cpu["bf16"] = cpu_multiplies_bf16()
    facts.apex = describe(torch.device("cuda" if facts.devices else "cpu"))
