"""What a model's attention is made of, layer by layer: the five choices, parameters and KV bytes
per token.

    print(effattn.describe(model))
    effattn.describe(model).to_dict()
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from rich.console import Console, Group
from rich.table import Table
from torch import nn

from effattn.hf import anatomy, hooks, positions
from effattn.hf.weights import numbers, packing
from effattn.interface import Backend, Shape
from effattn.specs import format_spec
from effattn.surgery.replace import spec_of

AXES = ("projections", "heads", "positions", "pattern", "cache")
GROW = ("full", "summaries", "slots")  # in the name of a state that holds more with every token


@dataclass(frozen=True)
class Description:
    """`layers`: per layer its index, the five choices, parameters (attention, ffn, norms),
    kv_bytes_per_token (of a token that its cache holds) and grows (whether the cache holds more
    with every token; rings and sums do not).

    `parameters`: embeddings, attention, ffn, norms, head, other and total, each weight counted
    once; `shares` are their parts of the total."""

    model: str
    family: str
    dtype: str
    layers: list[dict] = field(repr=False)
    parameters: dict[str, int]

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of all parameters."""
        total = self.parameters["total"]
        return {part: count / total for part, count in self.parameters.items()}

    @property
    def kv_bytes_per_token(self) -> int | float:
        """Bytes that all layers' caches grow by with each token, however many there are: rings,
        which stop when their window is full, do not count. Of packed caches, scales and zeros
        included, once tokens leave the residual; exact, and not whole where tokens share bytes."""
        return sum(layer["kv_bytes_per_token"] for layer in self.layers if layer["grows"])

    def to_dict(self) -> dict:
        """Plain numbers, strings, lists and dicts, for JSON."""
        return asdict(self) | {"shares": self.shares, "kv_bytes_per_token": self.kv_bytes_per_token}

    def __rich__(self) -> Group:
        columns = ("layers", *AXES, "parameters", "KV bytes/token")
        table = Table(
            *columns, title=f"{self.model} ({self.family}, {self.dtype})", title_justify="left"
        )
        for column in table.columns[-2:]:
            column.justify = "right"
        for first, last, row in _runs(self.layers):
            name = f"{first}" if first == last else f"{first}-{last}"
            count = f"{sum(row['parameters'].values()):,}"
            token = f"{row['kv_bytes_per_token']:,}" + ("" if row["grows"] else ", bounded")
            table.add_row(name, *(row[axis] for axis in AXES), count, token)
        parts = ", ".join(
            f"{part} {count:,} ({self.shares[part]:.1%})"
            for part, count in self.parameters.items()
            if part != "total" and count
        )
        total = f"parameters: {self.parameters['total']:,} = {parts}"
        layers = self.parameters["attention"] + self.parameters["ffn"] + self.parameters["norms"]
        inside = ", ".join(
            f"{part} {self.parameters[part] / layers:.1%}" for part in ("attention", "ffn")
        )
        return Group(
            table,
            total,
            f"inside the layers: {inside}",
            f"KV bytes per token, {self._growing}: {self.kv_bytes_per_token:,}",
        )

    @property
    def _growing(self) -> str:
        bounded = sum(not layer["grows"] for layer in self.layers)
        if not bounded:
            return "all layers"
        return f"{len(self.layers) - bounded} layers that grow ({bounded} hold a bounded number)"

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def describe(model: nn.Module) -> Description:
    """Describes a transformers causal LM or encoder, swapped or not: for each layer the five
    choices, its parameters and the bytes a token adds to its cache; of the whole, parameters by
    part (`Description`). Changes nothing. Raises Unsupported for unknown architectures.
    """
    parts = anatomy.of(model)
    layers = [_layer(layer, parts.config) for layer in parts.layers]
    done = positions.active(model)
    specs = {} if done is None else done.specs
    for layer in layers if specs else []:
        layer["positions"] = _new_positions(layer["positions"], specs.get(layer["index"]))
    counts = {
        "embeddings": _count([parts.embeddings]),
        **{
            name: sum(layer["parameters"][name] for layer in layers)
            for name in ("attention", "ffn", "norms")
        },
        "head": _count([parts.head]),
    }
    counts["norms"] += _count([parts.final_norm])
    total = _count([model])
    # what is in no part (learned positions, a second head), so that the parts add up
    counts["other"] = total - sum(counts.values())
    dtype = str(layers and parts.layers[0].dtype).removeprefix("torch.")
    return Description(
        type(model).__name__, parts.family, dtype, layers, {**counts, "total": total}
    )


def _layer(layer: anatomy.Layer, config) -> dict:
    # a norm inside the attention (of queries, of keys) counts as a norm
    norms = set(_parameters(layer.norms))
    attention = set(_parameters([layer.attention, layer.o.module])) - norms
    ffn = set(_parameters([layer.ffn])) - norms
    more = ["global separate"] if hooks.GLOBAL in layer.attention._modules else []
    more += sorted({kind for module in layer.qkv_modules if (kind := packing(module))})
    swapped = getattr(layer.attention, hooks.ATTRIBUTE, None)
    if swapped is None or swapped.backend is None:
        pattern, cache = _own_pattern(layer), "full" if layer.window is None else "ring"
    else:
        pattern, cache = swapped.pattern, swapped.backend.traits.state
    grows = layer.causal and any(word in cache for word in GROW)
    token: int | float = layer.kv_bytes_per_token if layer.causal else 0
    if swapped is not None and swapped.backend is not None and grows and layer.latent is None:
        token = _growth(layer, swapped.backend)
    if swapped is not None and swapped.cache is not None:
        cache = str(swapped.cache) if cache == "full" else f"{swapped.cache}, {cache}"
        grows = grows and not swapped.cache.bounded
        memory = layer.latent
        if memory is None:
            beside = _growth(layer, swapped.backend) - layer.kv_bytes_per_token if grows else 0
            token = swapped.cache.bytes_per_token(layer) + max(0, beside)
        else:
            token = swapped.cache.latent_bytes(memory.rank)
    row = {
        "index": layer.index,
        "projections": ", ".join([spec_of(layer), *more]),
        "heads": _heads(layer),
        "positions": _positions(layer, config),
        "pattern": pattern,
        "cache": cache if layer.causal else "none",
        "parameters": {
            "attention": sum(map(numbers, attention)),
            "ffn": sum(map(numbers, ffn)),
            "norms": sum(map(numbers, norms)),
        },
        "kv_bytes_per_token": token,
        "grows": grows,
    }
    return row if layer.attends else row | dict.fromkeys(AXES[1:], "none") | {"grows": False}


def _growth(layer: anatomy.Layer, backend: Backend) -> int | float:
    heads, size = (layer.heads, layer.kv_heads), layer.k.like.element_size()
    bytes_ = backend.growth(Shape(1, *heads, 1, 1, layer.head_dim, layer.value_dim, size))
    return int(bytes_) if bytes_ == int(bytes_) else bytes_


def _heads(layer: anatomy.Layer) -> str:
    if layer.latent is not None:
        return layer.latent.spec
    if layer.kv_heads == layer.heads:
        return "mha"
    return "mqa" if layer.kv_heads == 1 else f"gqa(kv_heads={layer.kv_heads})"


def _positions(layer: anatomy.Layer, config) -> str:
    if not layer.rotary_dims:
        return "learned" if not layer.family.rotary else "nope"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = (getattr(config, "layer_types", None) or [None] * (layer.index + 1))[layer.index]
    rope = rope[kind] if isinstance(rope.get(kind), dict) else rope
    options = {"theta": rope["rope_theta"]} if rope.get("rope_theta") else {}
    if layer.rotary_dims != layer.head_dim:
        options["dims"] = layer.rotary_dims
    name = rope.get("rope_type", "default")
    options |= {"factor": rope["factor"]} if rope.get("factor") else {}
    return format_spec("rope" if name == "default" else name, options)


def _new_positions(own: str, spec: str | None) -> str:
    """A rule beside the model's learned positions is added to them."""
    return own if spec is None else f"learned+{spec}" if own == "learned" else spec


def _own_pattern(layer: anatomy.Layer) -> str:
    return "dense" if layer.window is None else f"sliding(window={layer.window})"


def _parameters(modules: Iterable[nn.Module | None]) -> list[nn.Parameter]:
    return [p for module in modules if module is not None for p in module.parameters()]


def _count(modules: Iterable[nn.Module | None]) -> int:
    return sum(map(numbers, dict.fromkeys(_parameters(modules))))


def _runs(layers: list[dict]) -> list[tuple[int, int, dict]]:
    """(first, last, layer) of every run of layers that differ in their index only."""
    runs: list[tuple[int, int, dict]] = []
    for layer in layers:
        if runs and {**runs[-1][2], "index": layer["index"]} == layer:
            runs[-1] = (runs[-1][0], layer["index"], runs[-1][2])
        else:
            runs.append((layer["index"], layer["index"], layer))
    return runs
