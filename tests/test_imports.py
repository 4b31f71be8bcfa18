"""Imports run downward: no arrow upward, no cycle, no private name of another module.

Function-level imports count like the others. `LAYERS` is the house, from the ground up; a module
may import from its own row and from those above it in this list.

Facades do not count: a package whose `__getattr__` finds public names by a table of strings
(`effattn`, `effattn.projections`, `effattn.prune`, ...) imports nothing by itself.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "effattn": "effattn",
    "kernels": "effattn.kernels",
    "prune": "effattn.prune",
    "quant": "effattn.quant",
    "recipes": "effattn.recipes",
    "bench": "bench",
}
LAYERS = [
    # torch and triton only
    ["kernels"],
    # no model, no tensors: errors, bounds of numbers, files and folders, pages
    ["errors", "bounds", "locking", "permissions", "outputs", "resuming", "reports", "stages"],
    # ONE attention layer, no model
    [
        "specs",
        "axes",
        "left_out",
        "traits",
        "registry",
        "calls",
        "sinks",
        "interface",
        "checks",
        "padding",
        "documents",
        "kmeans",
        "states",
        "positions",
        "patterns",
    ],
    ["damping", "projections"],
    # text
    ["embedded", "encoding", "dataset_rows", "textdata", "position_sampling"],
    # a live transformers model, and its files
    ["hf"],
    # what is measured on it
    ["profiling", "evaluate"],
    # what several methods share
    ["calibration", "training"],
    ["heads"],
    # what changes a live model: above heads and projections
    ["surgery"],
    # what transformers is told by `import effattn`
    ["plugin"],
    [
        "arena",
        "conformance",
        "exporting",
        "measuring",
        "swapping",
        "linearizing",
        "extending",
        "rehosting",
    ],
    ["quant"],
    ["prune"],
    # what chooses among all of them
    ["fitting"],
    # not in the wheel: a user of the package, by its public names
    ["bench"],
    ["recipes"],
    # what runs all recipes on a real model, and the pages that show it
    ["bench.real", "bench.docs"],
]


def modules() -> dict[str, Path]:
    """name -> file, of all modules of the package and of the benchmark."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


@cache
def arrows(name: str) -> list[tuple[str, str, int]]:
    """(module, name taken from it or "", line) of every import in a module, wherever it stands."""
    path, found = MODULES[name], []
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append(
                    (inner, "", node.lineno)
                    if inner in MODULES
                    else (base, alias.name, node.lineno)
                )
    return [(module, taken, line) for module, taken, line in found if module in MODULES]


def layer(name: str) -> int:
    """The row of a module; the package itself is above everything."""
    first, _, rest = name.removeprefix("effattn.").partition(".")
    if name == "effattn":
        return len(LAYERS)
    rows = {part: row for row, names in enumerate(LAYERS) for part in names}
    return rows.get(f"{first}.{rest.partition('.')[0]}", rows[first])


@pytest.mark.quick
def test_every_module_has_a_row():
    for name in MODULES:
        layer(name)


@pytest.mark.quick
def test_no_arrow_runs_upward():
    upward = [
        f"{name}:{line} takes {module}"
        for name in MODULES
        for module, _, line in arrows(name)
        if module != "effattn" and layer(module) > layer(name)
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.quick
def test_nobody_below_takes_the_package_itself():
    """`import effattn` inside the library would reach everything by attribute."""
    takers = [
        f"{name}:{line}"
        for name in MODULES
        for module, _, line in arrows(name)
        if module == "effattn" and not name.startswith("bench")
    ]
    assert not takers, "\n".join(takers)


@pytest.mark.quick
def test_no_module_is_in_a_cycle():
    graph = {
        name: {module for module, _, _ in arrows(name) if module not in (name, "effattn")}
        for name in MODULES
    }
    # Tarjan's components; iteratively would be longer, and the graph is a few hundred modules deep
    index, low, stack, cycles = {}, {}, [], []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                cycles.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    assert not cycles, "\n".join(", ".join(group) for group in cycles)


@pytest.mark.quick
def test_no_private_name_of_another_module():
    private = [
        f"{name}:{line} takes {module}.{taken}"
        for name in MODULES
        for module, taken, line in arrows(name)
        if taken.startswith("_") and not taken.startswith("__")
    ]
    assert not private, "\n".join(private)
