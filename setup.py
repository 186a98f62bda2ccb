"""Packaging of mome_dist, and the one place where the versions that it may run on are named.

Megatron-Core, DeepSpeed and Transformers break each other between minor versions. So every range ends before the next
one that nobody has tried, and ``make setup`` installs exactly what ``constraints.txt`` pins, which the tests run on.
The lower ends are those of an image for GPUs with torch 2.11 that the same tests were rehearsed on.

The name ``apex`` is absent on purpose: the package of that name in the public index is an unrelated web toolkit.
NVIDIA's Apex is built from source and used where it can be imported and CUDA is present (`mome_dist.nvidia_apex`).
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# 3.10 has no transformers, numpy, scipy and av of the pinned versions; the tests run on 3.11, and for 3.12 the code is
# compiled and type-checked. Later ones have no MediaPipe.
PYTHON_REQUIRES = ">=3.11,<3.13"

# What every command needs to read its configuration, a film and the files of a model: launchers, plans and checks run
# on a machine without torch.
REQUIREMENTS = [
    "hydra-core>=1.3.8,<1.4",
    "omegaconf>=2.3.1,<2.4",
    "huggingface_hub>=1.33,<2.5",  # models named as hf://OWNER/NAME
    "tokenizers>=0.23.2,<0.24",
    "rich>=15,<16",
    "argcomplete>=3.7,<4",
    "PyYAML>=6.0.3,<7",
    "numpy>=2.4,<2.6",
    "soundfile>=0.14,<0.15",
    "av>=18,<19",
    "opencv-python-headless>=5,<6",
]

# What it takes to transcribe and to export: neither Megatron-Core nor DeepSpeed. `mome_dist.extras` names the extra of
# a package that cannot be imported.
INFER = [
    "torch>=2.11,<2.14",
    "transformers>=5.17,<5.24",
    "safetensors>=0.8,<0.9",
    "accelerate>=1.15,<2",  # no import here: transformers spreads an LLM over devices with it, and reads GGUF
    "gguf>=0.19,<0.20",  # no import here: transformers reads the file of SmolLM2 with it
    "jiwer>=4,<5",
]

PREPARE = [
    "torch>=2.11,<2.14",  # webdataset's writer imports it
    "webdataset>=1.0.2,<1.1",
]

TRAIN = [
    *INFER,
    "megatron-core>=0.16.1,<0.17",  # 0.17 and later need Python 3.12
    "einops>=0.8.2,<0.9",  # no import here: Megatron-Core imports it and does not ask for it
    "deepspeed>=0.19.8,<0.20",  # install with DS_BUILD_OPS=0: no operator is compiled ahead of time
    "submitit>=1.5.4,<1.6",
    "hydra-submitit-launcher>=1.2,<1.3",  # no import here: Hydra finds it as hydra/launcher=submitit_slurm
    "webdataset>=1.0.2,<1.1",
    "tensorboard>=2.21,<3",  # no import here: torch.utils.tensorboard writes with it
    "matplotlib>=3.11,<4",
    "markdown-it-py>=4,<5",  # rich brings it, too
]

EXTRAS = {
    "infer": INFER,
    "prepare": PREPARE,
    "train": TRAIN,
    # torch's CUDA build brings CUDA, NCCL and Triton itself.
    "gpu": ["nvidia-ml-py>=13.615.71,<14"],  # no import here: DeepSpeed reads free GPU memory with it
    "test": [
        "peft==0.21.2",
        "pytest==9.2.0",
        "pytest-timeout==2.4.0",
        "pytest-xdist==3.8.0",
        "ruff==0.17.6",
        "scipy==1.17.1",
        "mypy==2.4.1",
        "types-PyYAML==6.0.12.20261113",
    ],
    # The site of docs/ (`make docs`), which a test builds.
    "docs": ["mkdocs==1.6.1", "mkdocs-material==9.8.2", "pymdown-extensions==13.1.2"],
    # What runs the notebook in docs/ anew (`make notebook`); the tests run its cells without a kernel.
    "notebook": [
        "nbclient==0.11.0",  # no import here: its program is run
        "ipykernel==7.4.0",  # no import here: it is the kernel
    ],
    # Its interpreter runs the kernels where there is no GPU. Not a test tool like the others: torch's CUDA builds bring
    # the Triton that they are made for, and its CPU builds none (tools/setup_environment.sh).
    "interpreter": ["triton==3.9.0"],
    "wandb": ["wandb==0.31.0"],
    # Speech for the synthetic corpus where flite cannot be installed. libespeak-ng itself is GPL-3.0: an optional
    # program at run time, never part of mome_dist.
    "espeak": ["espeakng-loader==0.2.4"],
}


def version() -> str:
    """Return ``__version__`` from the source text, without importing the package (its dependencies may be absent)."""
    source = (ROOT / "mome_dist" / "versions.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    assert match is not None, "mome_dist/versions.py holds no __version__"
    return match.group(1)


def long_description() -> str:
    """Return the text of the README, which a bare source tree may lack."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


if __name__ == "__main__":
    setup(
        name="mome_dist",
        version=version(),
        description="Distributed training of Mixture of Matryoshka Experts for audio-visual speech recognition",
        long_description=long_description(),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=PYTHON_REQUIRES,
        packages=[
            *find_packages(include=["mome_dist", "mome_dist.*"]),
            "mome_dist.configs",
            "mome_dist.slurm",
        ],
        # The Hydra tree and the scripts of Slurm stay at the top of a checkout, where users edit them; a wheel carries
        # them as mome_dist/configs and mome_dist/slurm.
        package_dir={"mome_dist.configs": "configs", "mome_dist.slurm": "slurm"},
        package_data={
            "mome_dist": ["py.typed"],
            "mome_dist.configs": ["**/*.yaml", "**/*.json"],
            "mome_dist.slurm": ["*.sh"],
        },
        entry_points={"console_scripts": ["mome-dist = mome_dist.commands.main:main"]},
        install_requires=REQUIREMENTS,
        extras_require=EXTRAS,
        classifiers=[
            "Development Status :: 4 - Beta",
            "Intended Audience :: Science/Research",
            "Operating System :: POSIX :: Linux",
            "Programming Language :: Python :: 3",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
        ],
    )
