"""Packaging: ranges, the lock, the wheel, make targets, and what may be in the tree."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Sequence
from email import message_from_string
from importlib.metadata import metadata, requires, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import mome_dist
from mome_dist.commands.main import main

ROOT = Path(__file__).resolve().parents[2]
LARGEST_FILE_BYTES = 1_000_000


@pytest.fixture(scope="module")
def setup_py() -> dict[str, Any]:
    """Names of setup.py, which sets nothing up when it is not the main program."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup_under_test")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Every file that git tracks and that is still there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def read_constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


# Extras with ranges, which users choose from; the others pin the tools of this project.
RANGED = ("infer", "prepare", "train", "gpu")
NOT_HERE = {"nvidia-ml-py"}  # `make setup` installs no package for GPUs


def ranged(setup_py: dict[str, Any]) -> list[Requirement]:
    """Every requirement that has a range, once."""
    extras = [text for name in RANGED for text in setup_py["EXTRAS"][name]]
    return [Requirement(text) for text in dict.fromkeys([*setup_py["REQUIREMENTS"], *extras])]


def test_every_requirement_has_a_range_and_is_installed_at_the_pin_in_it(setup_py: dict[str, Any]) -> None:
    pins = {canonicalize_name(pin.name): pin for pin in read_constraints()}
    for requirement in ranged(setup_py):
        assert [bound.operator for bound in sorted(requirement.specifier, key=str)] == ["<", ">="], requirement
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(next(iter(pin.specifier)).version), (requirement, pin)
        # A local suffix (2.13.0+cpu) does not matter to ==.
        if requirement.name not in NOT_HERE:
            assert pin.specifier.contains(version(requirement.name)), (pin, version(requirement.name))
    extras = [Requirement(text) for name in ("test", "espeak", "wandb") for text in setup_py["EXTRAS"][name]]
    for pin in [*pins.values(), *extras]:
        assert [bound.operator for bound in pin.specifier] == ["=="], pin
    for pin in extras:
        assert pin.specifier.contains(version(pin.name)), (pin, version(pin.name))


# An image for GPUs that brings its own packages: what is not here is carried there (tools/gpu_wheels.sh).
IMAGE = {
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    "accelerate": "1.15.0",
    "tokenizers": "0.23.2",
    "safetensors": "0.8.0",
    "numpy": "2.5.2",
    "huggingface-hub": "1.33.0",
}


def test_the_metadata_allows_an_image_with_packages_of_its_own(setup_py: dict[str, Any]) -> None:
    """Also what is carried there does: Megatron-Core, DeepSpeed and the rest."""
    assert IMAGE["python"] in SpecifierSet(setup_py["PYTHON_REQUIRES"])
    own = [each for each in ranged(setup_py) if each.name not in NOT_HERE]
    carried = [each.name for each in own if canonicalize_name(each.name) not in IMAGE]
    asked = [("mome_dist", requirement) for requirement in own]
    asked += [(name, Requirement(text)) for name in carried for text in requires(name) or ()]
    met = 0
    for name, requirement in asked:
        there = IMAGE.get(canonicalize_name(requirement.name))
        if there is not None and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            assert requirement.specifier.contains(there), f"{name} asks for {requirement}, there is {there}"
            met += 1
    assert met >= 12, "the tests above look at nothing"


def test_a_checkout_that_is_not_installed_has_its_version_and_records_those_of_others(
    tmp_path: Path, tracked: list[Path]
) -> None:
    """As in a container with this folder mounted: every package but this one has metadata."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(("mome", "__editable__", "deepspeed-")):
            (tmp_path / entry.name).symlink_to(entry)
    say = "from mome_dist.versions import version_of as v; import sys; print([v(name) for name in sys.argv[1:]])"
    command = [sys.executable, "-S", "-c", say, "mome_dist", "torch", "deepspeed"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    told = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(told) == [mome_dist.__version__, version("torch"), "unknown"]
    asking = [path for path in tracked if path.suffix == ".py" and "importlib.metadata" in path.read_text("utf-8")]
    assert set(asking) == {ROOT / "mome_dist/versions.py", Path(__file__)}, "elsewhere a missing record stops a run"


def test_every_python_has_exactly_one_range_of_each_requirement(setup_py: dict[str, Any]) -> None:
    requirements = ranged(setup_py)
    names = [canonicalize_name(requirement.name) for requirement in requirements]
    assert len(names) == len(set(names))
    assert not any(requirement.marker for requirement in [*requirements, *read_constraints()])


def test_the_same_pythons_are_claimed_everywhere(setup_py: dict[str, Any]) -> None:
    claimed = SpecifierSet(setup_py["PYTHON_REQUIRES"])
    pythons = [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}" in claimed]
    assert pythons == ["3.11", "3.12"]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in claimed
    ruff = tomllib.loads((ROOT / "ruff.toml").read_text(encoding="utf-8"))
    assert ruff["target-version"] == f"py{pythons[0].replace('.', '')}"
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert mypy["python_version"] == pythons[0]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"Python\s+(3\.\d+(?: or 3\.\d+)?)", readme)) == {" or ".join(pythons)}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (checked,) = re.findall(r"printf '%s\\n' ([\d. ]+) \| xargs .* -m mypy --python-version", makefile)
    assert checked.split() == pythons


def test_every_installed_requirement_allows_the_pythons_that_are_claimed(setup_py: dict[str, Any]) -> None:
    for requirement in [*ranged(setup_py), *map(Requirement, setup_py["EXTRAS"]["test"])]:
        if requirement.name in NOT_HERE:
            continue
        allowed = SpecifierSet(str(metadata(requirement.name).json.get("requires_python", "")))
        assert all(python in allowed for python in ("3.11", "3.12")), (requirement.name, str(allowed))


def test_the_lock_pins_nothing_twice(setup_py: dict[str, Any]) -> None:
    pinned = [pin for name, extra in setup_py["EXTRAS"].items() if name not in RANGED for pin in extra]
    extras = {canonicalize_name(Requirement(pin).name) for pin in pinned}
    locked = [canonicalize_name(requirement.name) for requirement in read_constraints()]
    assert len(locked) == len(set(locked)) and not extras & set(locked)
    assert "apex" not in extras | set(locked)


def test_a_wheel_carries_configuration_scripts_and_extras(tmp_path: Path) -> None:
    source, out, site = tmp_path / "source", tmp_path / "out", tmp_path / "site"
    for name in ("mome_dist", "configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    nested = source / "configs" / "group" / "subgroup"
    nested.mkdir(parents=True)
    (nested / "added.yaml").write_text("x: 1\n", encoding="utf-8")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(out), str(source)], check=True, timeout=120)
    with zipfile.ZipFile(next(out.glob("mome_dist-*.whl"))) as wheel:
        wheel.extractall(site)
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"mome_dist"}
    expected = {path.relative_to(source / "configs") for path in (source / "configs").rglob("*.yaml")}
    packaged = site / "mome_dist" / "configs"
    assert {path.relative_to(packaged) for path in packaged.rglob("*.yaml")} == expected
    entry = next(site.glob("*.dist-info/entry_points.txt")).read_text(encoding="utf-8")
    assert "mome-dist = mome_dist.commands.main:main" in entry
    told = message_from_string(next(site.glob("*.dist-info/METADATA")).read_text(encoding="utf-8"))
    assert {"infer", "prepare", "train", "gpu"} <= set(told.get_all("Provides-Extra", []))
    brought = {extra: _brought(told.get_all("Requires-Dist", []), extra) for extra in ("", "infer", "train")}
    assert brought[""] < brought["infer"] < brought["train"]
    assert brought["train"] - brought["infer"] >= {"megatron-core", "deepspeed"} and "torch" in brought["infer"]

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert Path(run("-c", "from mome_dist.paths import configs_dir; print(configs_dir())").strip()) == packaged
    assert "# configs/llm/tiny.yaml: " in run("-m", "mome_dist", "config", "show", "experiment=tiny")
    (tmp_path / "work").mkdir()
    listed = run("-m", "mome_dist", "slurm", "init", "work").split()
    scripts = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "work/slurm").iterdir()}
    assert sorted(listed) == sorted(f"work/slurm/{name}" for name in scripts)
    expected_scripts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "slurm").glob("*.sh")}
    changed = {name for name, text in scripts.items() if text != expected_scripts[name]}
    assert changed == {"common.sh"} and scripts.keys() == expected_scripts.keys()
    asked = ["bash", "-c", "source slurm/common.sh; echo $MOME_DIST_PYTHON"]
    python = subprocess.run(asked, cwd=tmp_path / "work", capture_output=True, text=True, check=True).stdout.strip()
    assert python == sys.executable


def _brought(requirements: Sequence[str], extra: str) -> set[str]:
    """Names of the packages that an extra of a wheel brings, with those of the base."""
    found = [Requirement(text) for text in requirements]
    return {each.name for each in found if each.marker is None or each.marker.evaluate({"extra": extra})}


def test_scripts_of_slurm_replace_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "init", str(tmp_path)]) == 0
    (tmp_path / "slurm/train.sh").write_text("mine")
    capsys.readouterr()
    assert main(["slurm", "init", str(tmp_path)]) == 2
    assert f"{tmp_path}/slurm/common.sh exists, and is not replaced" in capsys.readouterr().err
    assert (tmp_path / "slurm/train.sh").read_text() == "mine"
    assert main(["slurm", "init", str(tmp_path / "none")]) == 2
    assert "none does not exist; make it first" in capsys.readouterr().err


def test_a_checkout_uses_its_own_configuration_tree() -> None:
    from mome_dist.paths import configs_dir

    assert configs_dir() == ROOT / "configs"


def test_documented_make_targets_exist() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = {line.split()[0] for line in listed.splitlines()}
    assert {"setup", "assets", "lint", "test", "docs", "quickstart", "clean"} <= targets
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / ".ci" / "run"]
    used = {name for path in documents for name in re.findall(r"`make ([a-z]+)", path.read_text(encoding="utf-8"))}
    assert used <= targets
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_no_large_file_is_tracked(tracked: list[Path]) -> None:
    assert not [path for path in tracked if path.stat().st_size > LARGEST_FILE_BYTES]


def test_nothing_ties_the_tree_to_one_machine(tracked: list[Path]) -> None:
    """No home or work folders of one machine, and no addresses of package indexes: pip's own settings name those."""
    words = [
        "/work" + "/main",
        "/work" + "/shared",
        "/root" + "/",
        "pypi" + ".org",
        "python" + "hosted",
        ".." + "/shared",
    ]
    pattern = re.compile("|".join(map(re.escape, words)))
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked
        if path.suffix in {".py", ".ipynb", ".md", ".sh", ".toml", ".txt", ".yaml", ".json", ""}
        for match in pattern.finditer(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not found
