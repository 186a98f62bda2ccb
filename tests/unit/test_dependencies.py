"""What is imported is declared, where it is imported; what is declared is imported, or says why it is not."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mome_dist.diagnosis import facts
from mome_dist.errors import UserError
from mome_dist.extras import EXTRA_OF, told_if_missing

ROOT = Path(__file__).resolve().parents[2]
# Packages whose import has another name than the package.
IMPORTS = {
    "webvtt-py": "webvtt",
    "hydra-core": "hydra",
    "opencv-python-headless": "cv2",
    "megatron-core": "megatron",
    "hydra-submitit-launcher": "hydra_plugins",
    "espeakng-loader": "espeakng_loader",
    "huggingface-hub": "huggingface_hub",
    "pytest-xdist": "xdist",
    "pytest-timeout": "pytest_timeout",
    "nvidia-ml-py": "pynvml",
    "types-pyyaml": "yaml",
    "pyyaml": "yaml",
    "markdown-it-py": "markdown_it",
}
# Imported where it is installed, and never asked for: built from source, or another project's code to compare with.
OPTIONAL = {"apex", "amp_C", "avhubert", "fairseq"}
# Own folders, and what tests put on the path themselves.
OWN = {"mome_dist", "launchers", "tools", "benchmarks", "tests", "docs", "fused_layer_norm_cuda", "setuptools"}


@cache
def _imported(folder: Path) -> dict[str, set[str]]:
    """Packages of others that the files of a folder import, anywhere in them, and the files."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
                texts = (each.value for each in node.args if isinstance(each, ast.Constant))
                names = [text for text in texts if isinstance(text, str)]
            for package in {name.partition(".")[0] for name in names} - OWN - OPTIONAL - sys.stdlib_module_names:
                found.setdefault(package, set()).add(str(path.relative_to(ROOT)))
    return found


def _import_of(requirement: str) -> str:
    name = canonicalize_name(Requirement(requirement).name)
    return IMPORTS.get(name, name.replace("-", "_"))


@pytest.fixture(scope="module")
def setup_py() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup_under_test")


@pytest.fixture(scope="module")
def declared(setup_py: dict[str, Any]) -> dict[str, set[str]]:
    """The extras that bring each package, by the name of its import; "" is the base."""
    found: dict[str, set[str]] = {}
    for extra, requirements in {"": setup_py["REQUIREMENTS"], **setup_py["EXTRAS"]}.items():
        for requirement in requirements:
            found.setdefault(_import_of(requirement), set()).add(extra)
    return found


def test_what_the_package_imports_is_declared(declared: dict[str, set[str]]) -> None:
    users = {"", "infer", "prepare", "train", "gpu", "wandb", "espeak", "interpreter"}
    for package, files in _imported(ROOT / "mome_dist").items():
        assert declared.get(package, set()) & users, f"{package} is imported by {files} and declared nowhere"


def test_what_tests_and_benchmarks_import_is_declared_or_locked(declared: dict[str, set[str]]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    locked = {_import_of(line) for line in lines if not line.startswith("#")}
    for folder in ("launchers", "tools", "tests", "benchmarks"):
        for package, files in _imported(ROOT / folder).items():
            assert package in declared.keys() | locked, f"{package} is imported by {files} and declared nowhere"


def test_what_is_declared_is_imported_or_says_why_not(declared: dict[str, set[str]]) -> None:
    code = set().union(*(_imported(ROOT / folder) for folder in ("mome_dist", "launchers", "tools")))
    tests = set().union(*(_imported(ROOT / folder) for folder in ("tests", "benchmarks")))
    lines = (ROOT / "setup.py").read_text(encoding="utf-8").splitlines()
    reasons = [line for line in lines if "# no import here: " in line]
    quoted = re.compile(r'"([\w-]+)[<>=]')
    explained = {_import_of(name[1]) for line in reasons if (name := quoted.search(line)) is not None}
    assert len(explained) == len(reasons) >= 5
    assert not explained & code, "imported after all: the reason is old"
    for package, extras in declared.items():
        if extras == {"docs"}:
            assert package in {"mkdocs", "mkdocs_material", "pymdown_extensions"}, f"{package}: no part of mkdocs"
        elif extras == {"test"}:
            assert package in tests | {"ruff", "mypy", "pytest_timeout"}, f"{package}: run as no program either"
        else:
            assert (package in code) != (package in explained), f"{package}: nothing imports it, and no reason is given"


def test_a_missing_package_names_the_extra_that_brings_it(declared: dict[str, set[str]]) -> None:
    """The table of `mome_dist.extras` is what setup.py says; the base is always there."""
    order = ["infer", "prepare", "train", "wandb", "espeak"]
    expected = {
        package: next(extra for extra in order if extra in extras)
        for package, extras in declared.items()
        if "" not in extras and set(order) & extras
    }
    expected["torch"] = "infer"
    assert expected == EXTRA_OF
    told = r"^megatron is not installed: pip install 'mome_dist\[train\]' brings it\.$"
    with pytest.raises(UserError, match=told), told_if_missing():
        raise ModuleNotFoundError("No module named 'megatron.core'", name="megatron.core")
    with pytest.raises(ModuleNotFoundError), told_if_missing():
        raise ModuleNotFoundError("No module named 'mome_dist.none'", name="mome_dist.none")


def test_doctor_looks_for_what_is_declared(setup_py: dict[str, Any], declared: dict[str, set[str]]) -> None:
    base = {canonicalize_name(Requirement(text).name) for text in setup_py["REQUIREMENTS"]}
    assert {canonicalize_name(name) for name in facts.CORE} == base - {"argcomplete"}
    looked = {**facts.CORE, **facts.FURTHER, **facts.OPTIONAL}
    assert {module: _import_of(name) for name, module in looked.items()} == {
        module: module for module in looked.values()
    }
    assert set(looked.values()) <= declared.keys()


def test_infer_brings_neither_megatron_nor_deepspeed(setup_py: dict[str, Any]) -> None:
    brought = {_import_of(text) for text in [*setup_py["REQUIREMENTS"], *setup_py["EXTRAS"]["infer"]]}
    assert not brought & {"megatron", "deepspeed", "submitit"} and {"torch", "transformers"} <= brought
    assert set(setup_py["EXTRAS"]["infer"]) <= set(setup_py["EXTRAS"]["train"])
