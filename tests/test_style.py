"""How the code is written, measured: density, length, docstrings, and where the formatter is off.

Formatting on its own says nothing of this: a line may hold forty tokens at any width.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator
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
TOKENS = 9  # of a line of code, the median of a folder
FUNCTION = 80  # lines
FILE = 400  # lines
RECIPE = 430  # lines: a whole flow on one page, of which up to 100 are settings

FILES = sorted(path for folder in (*FOLDERS, "tests") for path in (ROOT / folder).rglob("*.py"))
SHIPPED = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def tree_of(path: Path) -> ast.Module:
    """A file, parsed."""
    return ast.parse(path.read_text(encoding="utf-8"))


def shown(path: Path) -> str:
    """The name of a file in messages."""
    return path.relative_to(ROOT).as_posix()


def tokens_by_line(path: Path) -> Counter[int]:
    """line -> tokens, of the lines that have any: neither comments nor docstrings are code."""
    quiet = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found: Counter[int] = Counter()
    begins = True  # a statement; a string in triple quotes there is a docstring
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            continue
        if token.type in quiet:
            begins |= token.type != tokenize.NL
        elif not (begins and token.type == tokenize.STRING and '"""' in token.string[:4]):
            begins = False
            found[token.start[0]] += 1
    return found


@pytest.mark.quick
def test_lines_are_not_dense():
    lines: dict[str, list[int]] = {}
    for path in FILES:
        folder = "/".join(path.relative_to(ROOT).parent.parts[:2])
        lines.setdefault(folder, []).extend(tokens_by_line(path).values())
    medians = {folder: statistics.median(counts) for folder, counts in lines.items() if counts}
    assert {folder: median for folder, median in medians.items() if median > TOKENS} == {}


def literal(node: ast.expr | None) -> bool:
    """Whether an expression is data: nothing in it is computed."""
    match node:
        case ast.List() | ast.Tuple() | ast.Set():
            return all(map(literal, node.elts))
        case ast.Dict():
            return all(map(literal, [*node.keys, *node.values]))
        case ast.UnaryOp():
            return literal(node.operand)
    return isinstance(node, (ast.Constant, ast.Name, ast.Attribute))


def launch(node: ast.expr | None) -> bool:
    """Whether an expression starts a kernel: `kernel[grid](...)`, or a `launch` with its name."""
    if not isinstance(node, ast.Call):
        return False
    return isinstance(node.func, ast.Subscript) or ast.unparse(node.func).endswith("launch")


@pytest.mark.quick
def test_the_formatter_skips_only_tables_and_launches():
    wrong = []
    for path in FILES:
        skipped = {
            number
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if line.endswith(("  # fmt: " + "skip", "# fmt: " + "off"))
        }
        for node in ast.walk(tree_of(path)):
            value = getattr(node, "value", None)
            table = isinstance(value, (ast.List, ast.Tuple, ast.Set, ast.Dict)) and literal(value)
            if isinstance(node, ast.stmt) and (table or launch(value)):
                skipped.discard(node.end_lineno)
        wrong += [f"{shown(path)}:{line}" for line in sorted(skipped)]
    assert not wrong, "\n".join(wrong)


def jitted(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is Triton's, which has to be one piece."""
    return any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Of a function, without its docstring, which may have much to say."""
    first = node.body[0]
    said = 0
    if ast.get_docstring(node) is not None:
        said = first.end_lineno - first.lineno + 1
    return node.end_lineno - node.lineno + 1 - said


@pytest.mark.quick
def test_functions_are_short():
    long = {
        f"{shown(path)} {node.name}": lines(node)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, DEFINITIONS) and not jitted(node)
    }
    assert {name: n for name, n in long.items() if n > FUNCTION} == {}


@pytest.mark.quick
def test_files_are_short():
    sizes = {shown(path): path.read_text(encoding="utf-8").count("\n") for path in SHIPPED}
    most = {name: RECIPE if name.startswith("recipes/") else FILE for name in sizes}
    assert {name: n for name, n in sizes.items() if n > most[name]} == {}


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(dotted name, definition) of what has no underscore in front, methods included."""
    for node in body:
        if isinstance(node, (*DEFINITIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


def silent(path: Path, node: ast.AST) -> bool:
    """A setter or an overload, whose other half says it, or a script's `main`, whose `--help` would
    be the docstring."""
    half = any(ast.unparse(one).endswith((".setter", "overload")) for one in node.decorator_list)
    return half or (path.parent.name in ("recipes", "bench") and node.name == "main")


def inherited(path: Path, name: str) -> bool:
    """Whether a method has no docstring because its class's parent says what it does."""
    owner, _, method = name.rpartition(".")
    if not owner:
        return False
    folder = path.relative_to(ROOT).parts[0]
    parts = path.relative_to(ROOT / folder).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    found = importlib.import_module(".".join((FOLDERS[folder], *parts)))
    for attribute in owner.split("."):
        found = getattr(found, attribute)
    # `getdoc` looks for a method's documentation in the parents, too
    return any(inspect.getdoc(vars(parent).get(method)) for parent in found.__mro__) or bool(
        inspect.getdoc(getattr(found, method))
    )


@pytest.mark.quick
def test_everything_public_is_documented():
    bare = []
    for path in SHIPPED:
        tree = tree_of(path)
        if tree.body and not ast.get_docstring(tree):
            bare.append(shown(path))
        bare += [
            f"{shown(path)}:{node.lineno} {name}"
            for name, node in public(tree.body)
            if not (ast.get_docstring(node) or silent(path, node) or inherited(path, name))
        ]
    assert not bare, "\n".join(bare)
