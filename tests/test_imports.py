"""Imports point one way, counted wherever they stand: in functions, and under `TYPE_CHECKING`."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FACES = ("lens", "result", "figures", "report", "experiments", "explore", "cli")
BODIES = ("model", "facts", "loading", "runs", "sweep", "flow", "interventions", "features", "system", "html")


def _modules() -> dict[str, Path]:
    """Every module of the package, by name."""
    found = {}
    for folder, package in (("mambalens", "mambalens"), ("hooks", "mambalens.hooks"), ("data", "mambalens.data")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = _modules()


def imports(name: str) -> set[str]:
    """What a module imports of the package."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & set(MODULES)) - {name}


GRAPH = {name: imports(name) for name in MODULES}


def _is_in(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == f"mambalens.{part}" or name.startswith(f"mambalens.{part}.") for part in parts)


def test_what_is_imported_of_the_package_is_there() -> None:
    """Also in functions and tests, which no type checker and no import at the start looks at."""
    files = [*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").glob("*.py")]
    nodes = [(file.name, node) for file in files for node in ast.walk(ast.parse(file.read_text()))]
    named = {
        (file, node.module, alias.name)
        for file, node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mambalens"
        for alias in node.names
    }
    assert len(named) > 500
    missing = []
    for file, module, name in sorted(named):
        try:
            found = hasattr(importlib.import_module(module), name) or f"{module}.{name}" in MODULES
        except ModuleNotFoundError:
            found = False
        if not found:
            missing.append((file, module, name))
    assert not missing


def test_there_is_no_circle() -> None:
    order = list(TopologicalSorter(GRAPH).static_order())  # raises, naming the circle
    assert len(order) == len(MODULES) > 50


def test_hooks_know_nothing_above_them() -> None:
    assert {used for name in MODULES if _is_in(name, ("hooks",)) for used in GRAPH[name]} <= {
        name for name in MODULES if _is_in(name, ("hooks",))
    }


def test_no_body_imports_a_face() -> None:
    wrong = {(name, used) for name in MODULES if _is_in(name, BODIES) for used in GRAPH[name] if _is_in(used, FACES)}
    assert not wrong


def test_an_adapter_is_imported_by_nobody() -> None:
    adapters = {name for name in MODULES if name.startswith("mambalens.hooks.mixer_")}
    assert len(adapters) >= 3
    assert not {(name, used) for name in MODULES for used in GRAPH[name] & adapters}
