"""What goes with what: every position rule and every cache format with every pattern, tried out.

Between `<!-- code:BLOCK -->` and `<!-- /code -->` stands what `BLOCKS[BLOCK]` makes: a small random
Llama is swapped, reads a prompt and goes on with its cache. What refuses is in the table with the
words that it refuses with, so that the table cannot say what the code does not do."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

import effattn
from effattn.errors import check_choice
from effattn.exporting import capabilities
from effattn.left_out import LEFT_OUT
from effattn.reports.tables import Table, markdown_text

MARKER = re.compile(r"(<!-- code:(?P<block>\w+) -->\n).*?(<!-- /code -->)", re.DOTALL)
WHERE = re.compile(r"^(\w+ cannot be swapped, layers 0: |layer 0: )+")  # how a refusal begins
TOKENS = 40  # of the text that is read: more than any window below
# Values for options that have no default, and for those without which a rule does nothing.
OPTIONS = {
    "base": 1e5,
    "block": 16,
    "dilations": [1, 2],
    "factor": 2.0,
    "k": 8,
    "kappa": 0.5,
    "long_factor": [2.0] * 8,
    "segments": [16, 32],
    "stride": 8,
    "window": 16,
}
ALWAYS = ("factor", "long_factor")
# Options that decide what a member goes with.
PATTERNS = ("sliding(window=16, sinks=4)", "sliding(window=16, dilation=2)")
RULES = ("rope+alibi",)
CACHES = (
    "int8",
    "int4",
    "int2",
    "fp8",
    "int4(pre_rope=True)",
    "int4(rotate='v')",
    "int4(rotate='k')",
    "paged(page=16)",
    "evict(policy='snapkv', keep=0.5, recent=8)",
)


def positions_block() -> str:
    """Which position rules go with which patterns, in Markdown."""
    rules = [_spec(name, rule) for name, rule in effattn.positions.rules().items()]
    return _block([*rules, *RULES], "positions")


def caches_block() -> str:
    """Which caches go with which patterns, in Markdown."""
    return _block(CACHES, "cache")


def capabilities_block() -> str:
    """What of a result runs in which engine: the table that exports refuse by."""
    table = Table("", ["part of a result", *capabilities.ENGINES.values()], capabilities.table())
    return table.markdown().partition("\n\n")[2].replace("---:", "---") + "\n"


def left_out_block() -> str:
    """What is not here, and why, in Markdown."""
    lines = [
        [one.title, one.source, f"{one.reason}.", one.instead or "nothing"]
        for members in LEFT_OUT.values()
        for one in members.values()
    ]
    header = ["method", "paper", "why it is not here", "instead"]
    table = Table("", header, lines).markdown().partition("\n\n")[2].partition("\n\n")[0]
    return f"{table.replace('---:', '---')}\n"


BLOCKS: dict[str, Callable[[], str]] = {
    "positions": positions_block,
    "caches": caches_block,
    "capabilities": capabilities_block,
    "left_out": left_out_block,
}


def update(text: str) -> str:
    """`text` with its blocks made new. ValueError for unknown blocks, and markers without an
    end.
    """
    if text.count("<!-- code:") != len(MARKER.findall(text)):
        raise ValueError("docs: a marker is not <!-- code:BLOCK --> … <!-- /code -->")

    def fill(found: re.Match) -> str:
        check_choice("docs: block", found["block"], BLOCKS)
        return f"{found[1]}{BLOCKS[found['block']]()}{found[3]}"

    return MARKER.sub(fill, text)


def _block(specs: Iterable[str], axis: str) -> str:
    """A line a pattern, a column for all `specs` of the axis that go the same way, and the
    refusals below.
    """
    patterns = [_spec(name, cls) for name, cls in effattn.backends().items()]
    patterns = [spec for spec in (*patterns, *PATTERNS) if tried(spec) is None]  # others: encoders
    patterns.sort()
    columns: dict[tuple, list[str]] = {}
    said: dict[str, str] = {}  # by what alike refusals have in common: the first of them, in full
    for spec in specs:
        refusals = [tried(pattern, **{axis: spec}) for pattern in patterns]
        kinds = [r and _kind(r, p, spec) for r, p in zip(refusals, patterns, strict=True)]
        for kind, refusal in zip(kinds, refusals, strict=True):
            if kind:
                said.setdefault(kind, refusal)
        columns.setdefault(tuple(kinds), []).append(spec)
    numbers = {kind: f"no ({number})" for number, kind in enumerate(said, 1)}
    lines = [
        [_short(pattern), *(numbers.get(kind, "yes") for kind in row)]
        for pattern, row in zip(patterns, zip(*columns, strict=True), strict=True)
    ]
    header = ["pattern", *(", ".join(map(_short, alike)) for alike in columns.values())]
    table = Table("", header, lines).markdown().partition("\n\n")[2].partition("\n\n")[0]
    table = table.replace("---:", "---")  # words, where the engine puts numbers to the right
    notes = [
        f"{n}. {markdown_text(WHERE.sub('', text))}" for n, text in enumerate(said.values(), 1)
    ]
    return "\n".join(
        [table, "", "The refusals, as the first one of each kind is said:", "", *notes, ""]
    )


def tried(pattern: str, **axes: str) -> str | None:
    """Why a model cannot have the pattern with these axes; None if it reads and goes on."""
    model, tokens = _model(), torch.arange(TOKENS)[None]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # windows as long as the training, groups that shrink
            effattn.swap(model, pattern, **axes)
            cache = effattn.new_cache(model)
            model(tokens[:, :-4], past_key_values=cache)
            model(tokens[:, -4:], past_key_values=cache)
    except ValueError as error:  # Unsupported is one
        return str(error)
    return None


def _model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=64,
        )
    ).eval()


def _spec(name: str, cls: type) -> str:
    """The shortest spec of a member that does something, by the signature of its class."""
    parameters: Mapping = inspect.signature(cls).parameters
    asked = [p.name for p in parameters.values() if p.default is p.empty or p.name in ALWAYS]
    if missing := [option for option in asked if option not in OPTIONS]:
        raise ValueError(f"{name}: no value to try for {', '.join(missing)}; valid: {[*OPTIONS]}")
    options = ", ".join(f"{option}={OPTIONS[option]!r}" for option in asked)
    return f"{name}({options})" if options else name


def _short(spec: str) -> str:
    """A spec as a reader knows it: names, and only those options that `_spec` did not add."""
    special = re.search(r"(sinks|dilation|pre_rope|rotate)=[^,)]+", spec)
    return re.sub(r"\([^)]*\)", "", spec) + (f" with `{special[0]}`" if special else "")


def _kind(refusal: str, pattern: str, spec: str) -> str:
    """A refusal without what is different in others of its kind: the names, and what is
    remembered.
    """
    refusal = WHERE.sub("", refusal).replace(spec, "").replace(pattern.partition("(")[0], "")
    refusal = re.sub(r"""['"][^'"]*\(?[^)]*\)?['"]|remembers is [^;]*""", "", refusal)
    return re.sub(r"valid are .*|packed caches go .*", "", refusal)
