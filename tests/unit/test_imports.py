"""What imports what: no file needs a file that needs it, and no folder a folder, not even inside of a function."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mome_dist", "launchers", "tools", "benchmarks")


def _modules(root: Path) -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def _imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in modules else node.module for name in inside]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name for name in names if name in modules}


def _folder(module: str) -> str:
    """What a module counts for: a folder of the package with all that is in it, or a module beside them."""
    package, *inside = module.split(".")
    if package != "mome_dist" or not inside:
        return package
    return f"{package}.{inside[0]}"


def _order(root: Path, by_folder: bool = False) -> list[str]:
    """All modules, or folders, each after those that it imports.

    Raises:
        CycleError: if there is none; its second argument is a circle.
    """
    modules = _modules(root)
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        needed = _imports(path, modules)
        if by_folder:
            name, needed = _folder(name), set(map(_folder, needed))
        graph.setdefault(name, set()).update(needed - {name})
    return list(TopologicalSorter(graph).static_order())


def test_no_circle_of_files() -> None:
    assert len(_order(ROOT)) > 300


def test_no_circle_of_folders() -> None:
    order = _order(ROOT, by_folder=True)
    assert order.index("mome_dist.parallel") < order.index("mome_dist.llm") < order.index("mome_dist.training")


def test_a_circle_is_seen(tmp_path: Path) -> None:
    files = {
        "mome_dist/__init__.py": "",
        "mome_dist/one.py": "from mome_dist import two\n",
        "mome_dist/two.py": "import mome_dist.three\n",
        "mome_dist/three.py": "def late():\n    from mome_dist.one import something\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(CycleError) as caught:
        _order(tmp_path)
    assert set(caught.value.args[1]) == {"mome_dist.one", "mome_dist.two", "mome_dist.three"}
    (tmp_path / "mome_dist/three.py").write_text("")
    assert _order(tmp_path).index("mome_dist.three") < _order(tmp_path).index("mome_dist.one")
