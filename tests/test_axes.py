"""A member of an axis is one file and one row of a test table: nothing else lists members, or asks
which one it has.

The library's sources are read for string literals. A place that must agree with an axis is a
statement that names two of its members, a text that names three, or a comparison with one. The
member's own file may, and `KNOWN`, where each has a reason; a default (`method="optimal"`) is no
such place, since it stays what it is when a member comes.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from effattn import registry
from effattn.heads.methods import METHODS
from effattn.kernels.linear import MAPS
from effattn.patterns.linear import MAPS as LINEAR_MAPS
from effattn.positions.registry import rules
from effattn.projections.base import PROJECTIONS
from effattn.projections.packed import FORMATS as PACKED_FORMATS
from effattn.prune.structural.criteria import criteria
from effattn.prune.unstructured.methods import methods
from effattn.quant.formats import FORMATS
from effattn.states import caches

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
FOLDERS = ("effattn", "kernels", "prune", "quant", "recipes")


def shown(path: Path) -> str:
    """The name of a file in messages."""
    return path.relative_to(ROOT).as_posix()


def files_of(members: dict) -> dict[str, str]:
    """name -> the file that its class or function is in."""
    modules = {name: sys.modules[one.__module__] for name, one in members.items()}
    return {name: shown(Path(module.__file__).resolve()) for name, module in modules.items()}


# axis -> member -> its own file
AXES = {
    "pattern": files_of(registry.backends()),
    "position rule": files_of(rules()),
    "cache format": dict.fromkeys(FORMATS, "quant/formats.py"),
    "cache kind": files_of({kind.__name__: kind for kind in caches.kinds().values()}),
    "head method": files_of({name: one.merge for name, one in METHODS.items()}),
    "projection": files_of(PROJECTIONS.members()),
    "packed format": files_of(PACKED_FORMATS.members()),
    "one-shot method": files_of({name: type(one) for name, one in methods().items()}),
    "criterion": files_of({name: one.score for name, one in criteria().items()}),
    "feature map": dict.fromkeys(MAPS, "kernels/linear/features.py")
    | dict.fromkeys(set(LINEAR_MAPS) - set(MAPS), "effattn/patterns/linear.py"),
}

# What names members and need not agree with anything, by axis: the same word for something else, or
# what one member means to a rule that is about it.
APART = {
    "pattern": {
        "effattn/extending/rules.py": "a window with and without sinks is a row of the article",
        "effattn/left_out.py": "what to take instead of a method that is not here",
        "effattn/extending/tuning.py": "an example in an error",
        "effattn/linearizing/decay.py": "fits what `linear` and `gated` alone have",
        "effattn/positions/ntk.py": "a variant of NTK is called fixed",
        "effattn/profiling/operations.py": "a model's own layer: everything, or a window",
        "effattn/surgery/describing.py": "a model's own layer: everything, or a window",
        "effattn/exporting/capabilities.py": "what engines make of single patterns",
        "effattn/exporting/plain.py": "the window that plain transformers has",
        "effattn/swapping/patterns.py": "a window without its sinks stands beside it",
        "prune/shearing/batch_loading.py": "a rule of batch loading is called fixed",
        "effattn/fitting/accounting.py": "a layer is dense, or has the window of a budget's axis",
        "quant/packed/layer.py": "a layer without a pattern of its own is dense",
        "recipes/pretrain_embedded.py": "a variant of the embedded model is called dense",
    },
    "position rule": {
        "effattn/extending/article_plots.py": "two rules are drawn first",
        "effattn/embedded/making.py": "a variant of the embedded model is called logn",
        "effattn/extending/longrope.py": "the rules that a search for factors starts from",
        "effattn/extending/tuned_report.py": "what is claimed of some rules",
        "recipes/extend_tuning.py": "rope is what the model has already",
        "effattn/hf/positions.py": "rope is what the model has already",
        "effattn/exporting/gguf_file.py": "what llama.cpp has of transformers' rules",
        "effattn/exporting/openvino_model.py": "which of transformers' rules are numbers",
        "effattn/positions/kerple.py": "a kind of KERPLE is called power",
        "kernels/decode/ahead_of_time.py": "variants to compile",
        "kernels/flash/rules.py": "a kind of bias, which is the kernel's",
        "recipes/extend.py": "examples in --help; rope is what the model has already",
        "recipes/extend_context.py": "examples in --help",
    },
    "cache format": {
        "effattn/hf/weights.py": "a dtype of packed weights",
        "kernels/decode/packed_ahead_of_time.py": "variants to compile",
        "quant/weights.py": "a dtype of packed weights",
    },
    "head method": {
        "effattn/position_sampling.py": "a method of sampling positions is called random",
        "effattn/patterns/topk.py": "a summary of a block is its mean",
        "kernels/topk/selection.py": "a summary of a block is its mean",
        "kernels/monarch/ahead_of_time.py": "an argument of a kernel is called first",
    },
    "packed format": {
        "prune/unstructured/report.py": "a sparsity is called 2:4",
    },
    "criterion": {
        "effattn/position_sampling.py": "a method of sampling positions is called random",
    },
    "feature map": {
        "effattn/patterns/linear.py": "identity, of either sign, cannot be normalised",
        "kernels/linear/ahead_of_time.py": "variants to compile",
    },
}

# What must be looked at when a member comes, by axis: the fewer, the better.
AGREE = {
    "pattern": {
        "effattn/arena/widths.py": "which patterns compete, at one reach",
        "recipes/lra.py": "the patterns that are pretrained, unless others are asked for",
        "effattn/interface.py": "an error names the patterns that packed caches go with",
        "quant/packed/kind.py": "an error names the patterns that packed caches go with",
        "effattn/linearizing/approximation.py": "which option of a pattern is swept, and how far",
    },
    "position rule": {
        "effattn/extending/planner.py": "what the planner may advise, each with its own reason",
        "effattn/extending/rules.py": "the rules that the article compares",
        "effattn/extending/tuned.py": "the rules that are made for fine-tuning",
        "effattn/positions/base.py": "an error names the rules for models without rotary positions",
    },
    # Triton has no objects: a coding that is no integer is a branch in each kernel
    "cache format": {
        "effattn/fitting/candidates.py": "which formats, and how, a budget is searched with",
        "effattn/states/evict.py": "which formats pack a token by itself, and in what groups",
    }
    | {
        f"kernels/{file}": "a coding is a branch in each kernel"
        for file in (
            "decode/packed_tiles.py",
            "decode/packed_triton.py",
            "pack/codes.py",
            "pack/reference.py",
            "pack/torch_impl.py",
            "pack/triton_impl.py",
        )
    },
    "projection": {
        "effattn/fitting/candidates.py": "which projections a budget is searched with",
        "effattn/linearizing/approximation.py": "how far a projection's option is swept",
    },
    "packed format": {
        "effattn/fitting/candidates.py": "which sparsities a budget is searched with",
    },
    "feature map": {
        "effattn/linearizing/approximation.py": "the maps that the sweep of `linear` compares",
        "effattn/patterns/performer.py": "Performer's kernels are two of the maps",
        "kernels/linear/reference.py": "the definition that tests compare with",
        "kernels/linear/triton_impl.py": "maps whose rows are made before the kernel",
        "kernels/linear/triton_launches.py": "the numbers of the jitted twins",
    },
}

# `--help` and defaults do not wait for torch, so they cannot ask; they must be whole.
WHOLE = {
    "head method": ["recipes/convert_gqa.py", "recipes/sweep_gqa.py"],
    "one-shot method": ["recipes/prune_oneshot.py"],
    "criterion": ["recipes/prune_structured.py"],
}


def documentation(tree: ast.Module) -> set[ast.Constant]:
    """The docstrings: what they tell is not code."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    return {one.value for one in first if isinstance(one, ast.Expr)}


def own_parts(statement: ast.stmt) -> Iterator[ast.AST]:
    """The expressions of a statement, without those of the statements in it."""
    queue: list[ast.AST] = [statement]
    while queue:
        node = queue.pop()
        yield node
        queue += [one for one in ast.iter_child_nodes(node) if not isinstance(one, ast.stmt)]


def compared(nodes: list[ast.AST]) -> Iterator[ast.AST]:
    """What something is compared with: `x == "a"`, `x in ("a", "b")`, `case "a"`."""
    for node in nodes:
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                yield from getattr(side, "elts", [side])
        elif isinstance(node, ast.MatchValue):
            yield node.value


def statements(tree: ast.Module) -> list[tuple[list[str], list[str]]]:
    """(the texts in it, those of them that something is compared with), of each statement that has
    any."""
    quiet = documentation(tree)

    def texts(nodes: Iterable[ast.AST]) -> list[str]:
        constants = (one for one in nodes if isinstance(one, ast.Constant) and one not in quiet)
        return [one.value for one in constants if isinstance(one.value, str)]

    nodes = [list(own_parts(one)) for one in ast.walk(tree) if isinstance(one, ast.stmt)]
    found = [(texts(parts), texts(compared(parts))) for parts in nodes]
    return [one for one in found if one[0]]


@cache  # by the first test that asks: every worker of a parallel run imports this file
def library() -> dict[str, list[tuple[list[str], list[str]]]]:
    """file -> its statements."""
    return {
        shown(path): statements(ast.parse(path.read_text(encoding="utf-8")))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def named(text: str, names: set[str]) -> set[str]:
    """The members that a text names: it is one, or a spec of one, or a sentence of three."""
    first = text.partition("(")[0]
    if first in names:
        return {first}
    words = names.intersection(re.findall(r"\w+", text))
    return words if len(words) > 2 else set()


def agreeing(read: list[tuple[list[str], list[str]]], names: set[str]) -> set[str]:
    """The members that a file lists or asks for; read: its statements."""
    found = set()
    for texts, asked in read:
        together = set().union(*(named(text, names) for text in texts))
        found |= together if len(together) > 1 else names.intersection(asked)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = {'a': 1, 'b(n={})': 2}", "ab"),
        ("if x in ('a', 'd'):\n    y = 'b'", "a"),
        ("match x:\n    case 'c': pass", "c"),
        ("raise ValueError('valid are a, b and c')", "abc"),
        ("def f(method='a'):\n    'Does a, b or c.'\n    return g(method='b')", ""),
    ],
)
def test_what_is_read(source, found):
    assert agreeing(statements(ast.parse(source)), {*"abc"}) == {*found}


@pytest.mark.parametrize("axis", AXES)
def test_a_member_is_named_in_its_own_file_alone(axis):
    members = AXES[axis]
    found = {}
    for file, read in library().items():
        foreign = {name for name, own in members.items() if own != file}
        if agreed := agreeing(read, foreign):
            found[file] = sorted(agreed)
    whole = WHOLE.get(axis, [])
    for file in whole:
        assert found[file] == sorted(members), file
    known = {*whole, *APART.get(axis, {}), *AGREE.get(axis, {})}
    assert {file: names for file, names in found.items() if file not in known} == {}
    assert known - set(found) == set(), "no longer so"


@pytest.mark.parametrize("axis", AXES)
def test_members_have_files_of_their_own(axis):
    """A folder's files are found by themselves; formats and feature maps are rows of one table."""
    for file in AXES[axis].values():
        assert (ROOT / file).is_file()


def table_of_contributing() -> list[list[str]]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.mark.parametrize("row", table_of_contributing(), ids=lambda row: row[0])
def test_what_contributing_names_is_there(row):
    """Files and folders, and the tables of tests in them."""
    tables = dict(re.findall(r"`([A-Z]+)`[^`]* of `(\S+\.py)`", row[2]))
    for path in re.findall(r"`([\w./-]+/[\w.-]*)`", " ".join(row)):
        place = ROOT / path
        assert (place.parent if place.stem == "NAME" else place).exists(), path
    for name, file in tables.items():
        assert f"\n{name}" in (ROOT / file).read_text(encoding="utf-8"), f"{name} of {file}"


def test_contributing_tells_of_every_axis():
    assert set(AXES) <= {row[0] for row in table_of_contributing()}
