"""The recipes of images, which nothing here can build: their files exist and suffice, and their steps are those of
`make setup`, at its versions."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import mome_dist

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "containers"


def _instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile and their arguments."""
    text = (RECIPES / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition(" ") for line in lines if line and not line.startswith("#"))
    return [(name, rest.strip()) for name, _, rest in pairs]


def _sections() -> dict[str, list[str]]:
    """The lines of each section of the Apptainer recipe; "" is its head."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in (RECIPES / "mome_dist.def").read_text(encoding="utf-8").splitlines():
        if line.startswith("%"):
            name = line.strip()
            found[name] = []
        elif line.strip() and not line.startswith("#"):
            found[name].append(line.strip())
    return found


@pytest.fixture(scope="module")
def copied() -> list[str]:
    """What goes from the checkout into an image."""
    sources = [rest.split() for name, rest in _instructions() if name == "COPY"]
    return [source for words in sources for source in words[:-1]]


def test_both_recipes_take_the_same_files_and_steps(copied: list[str]) -> None:
    sections = _sections()
    assert [line.split() for line in sections["%files"]] == [[name, f"/opt/mome_dist/{name}"] for name in copied]
    steps = [rest for name, rest in _instructions() if name == "RUN"]
    assert [line for line in sections["%post"] if line not in ("set -e", "cd /opt/mome_dist")] == steps
    assert steps[1:] == ["tools/system_packages.sh", "tools/setup_environment.sh /opt/venv train,prepare,espeak"]
    places = [rest for name, rest in _instructions() if name == "WORKDIR"]
    assert places[0] == "/opt/mome_dist" and sections["%environment"] == ["export PATH=/opt/venv/bin:$PATH"]
    kept = (RECIPES / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert [line[1:] for line in kept if line.startswith("!")] == copied and "*" in kept


def test_they_are_the_steps_of_make_setup(copied: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for script in ("tools/system_packages.sh", "tools/setup_environment.sh"):
        assert f"\t{script}" in makefile and os.access(ROOT / script, os.X_OK)
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    used = set(re.findall(r"[\w./]+\.(?:txt|toml)", (ROOT / "tools/setup_environment.sh").read_text(encoding="utf-8")))
    assert used == {"constraints.txt"} and "constraints.txt" in copied


def test_versions_are_those_of_the_lock_and_of_the_metadata() -> None:
    """No package is pinned in a recipe: pip gets constraints.txt from the script. Python is the one that is tested."""
    bases = [rest for name, rest in _instructions() if name == "FROM"]
    bases += [line.removeprefix("From: ") for line in _sections()[""] if line.startswith("From: ")]
    pythons = {match[1] for base in bases if (match := re.fullmatch(r"python:(3\.\d+)-slim-bookworm", base))}
    assert len(bases) == 2 and len(pythons) == 1
    (python,) = pythons
    requires = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_under_test")["PYTHON_REQUIRES"]
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert python in SpecifierSet(requires) and python == mypy["python_version"]
    for recipe in ("Dockerfile", "mome_dist.def"):
        text = (RECIPES / recipe).read_text(encoding="utf-8")
        assert "==" not in text and "pip install" not in text
        assert re.search(r"never\s+built|never\s+builds", text, re.IGNORECASE), "that nobody has tried it is said"


def test_what_is_copied_is_all_that_the_installation_reads(copied: list[str], tmp_path: Path) -> None:
    for name in copied:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    asked = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(asked, cwd=tmp_path, check=True, capture_output=True)
    metadata = (tmp_path / "mome_dist.egg-info/PKG-INFO").read_text(encoding="utf-8")
    assert f"\nVersion: {mome_dist.__version__}\n" in metadata and "# mome_dist" in metadata
    sources = (tmp_path / "mome_dist.egg-info/SOURCES.txt").read_text(encoding="utf-8").split()
    assert {"slurm/train.sh", "configs/experiment/tiny.yaml", "mome_dist/commands/main.py"} <= set(sources)
