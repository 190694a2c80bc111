"""Imports point downward only (ARCHITECTURE.md, "Layers")."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "jaxtune"
RANKS = {
    "core": 0,
    "parallel": 0,
    "data": 1,
    "peft": 1,
    "objectives": 1,
    "models": 2,
    "optim": 2,
    "checkpoints": 3,
    "generate": 3,
    "training": 4,
    "rl": 5,
    "evaluate": 5,
    "planning": 5,
    "recipes": 6,
    "cli": 7,
}
# Neighbours of one rank do not import each other, but for these.
SIDEWAYS = {("parallel", "core")}
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc"}
TOP = ""  # jaxtune/__init__.py stands above all


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def package(module: str) -> str:
    """`jaxtune.core.tree` → `core`; `jaxtune` → TOP."""
    return module.split(".")[1] if "." in module else TOP


def imports(module: str, source: str) -> Iterator[tuple[str, int, bool]]:
    """Yields (jaxtune module, line, whether it runs when the module is imported)."""
    parent = (
        module if FILES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    )

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, top
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    up = parent.split(".")
                    base = ".".join([*up[: len(up) - child.level + 1], *filter(None, [base])])
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield (full if full in FILES else base), child.lineno, top
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                checked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, top and not inside and not checked)

    for name, line, top in walk(ast.parse(source), True):
        if name == "jaxtune" or name.startswith("jaxtune."):
            yield name, line, top


def upward(module: str, source: str) -> list[str]:
    """The imports of a module that do not point downward; those in functions count too."""
    here, found = package(module), []
    for name, line, _ in imports(module, source):
        there = package(name)
        down = there != TOP and RANKS[there] < RANKS[here]
        if here != there and not down and (here, there) not in SIDEWAYS:
            found.append(f"{module}:{line} imports {name}")
    return found


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components with more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_every_package_has_a_rank_and_none_is_a_drawer():
    packages = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert packages == set(RANKS)
    assert not any(part in DRAWERS for module in FILES for part in module.split("."))


@pytest.mark.parametrize("name", RANKS)
def test_imports_point_downward(name):
    modules = [module for module in FILES if package(module) == name]
    assert modules
    assert [line for m in modules for line in upward(m, FILES[m].read_text())] == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        module: {name for name, _, _ in imports(module, path.read_text()) if name in FILES}
        for module, path in FILES.items()
        if package(module) != TOP
    }
    assert cycles(graph) == []


def test_the_top_is_imported_by_nobody_and_imports_nothing_at_once():
    """The command line shows its help without jax, so the top is lazy."""
    source = FILES["jaxtune"].read_text()
    assert [name for name, _, runs in imports("jaxtune", source) if runs] == []


def test_files_stay_small():
    long = {m: n for m, p in FILES.items() if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxtune.core.tree", "from jaxtune.parallel import mesh"),
        ("jaxtune.data.chat", "def f():\n    from jaxtune.models.decoder import logits"),
        ("jaxtune.peft.lora", "import jaxtune.data.chat"),
        ("jaxtune.models.decoder", "from ..recipes import build"),
        ("jaxtune.cli.main", "import jaxtune"),
    ],
)
def test_the_walk_sees_an_upward_import(module, source):
    assert len(upward(module, source)) == 1


def test_the_walk_sees_a_circle():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
