"""What a layer may become: the ladder of each field, as far as the class can have it.

    ladders = candidates(parts, allow=("heads", "cache"), length=512)
    ladders[3]["kv_heads"]          # [4, 2, 1]: all but what the layer is

An axis is offered by one function, `@offer(field)`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection

from effattn.errors import Unsupported, check_choice
from effattn.fitting.plan import AXES, LayerChoice
from effattn.hf import anatomy, uneven
from effattn.hf.layer import Layer
from effattn.hf.weights import is_plain
from effattn.quant.formats import Format
from effattn.states import caches

FFN_STEP = 64
# Widths of an FFN on its ladder, as shares of what the layer has.
FFN_SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.375, 0.25)
WINDOWS = (2, 4)  # of these shares of the length that harm is measured on
FORMATS = (
    "int8(rotate='kv', group=16, symmetric=False)",
    "int8(rotate='kv', group=32, symmetric=False)",
    "int8(rotate='kv')",
    "int8",
    "fp8",
    "int4(v=8)",
    "int4(rotate='kv')",
    "int4",
    "int4(v=2)",
    "int2(rotate='kv')",
    "int2",
)
# The same with fewer of the newest tokens in full precision, as a share of the measured length.
RESIDUAL = 16
RESIDUALS = ("int8(rotate='kv', group=16, residual={})", "int4(rotate='kv', group=32, residual={})")
# Of the tokens before a query, the share that has to be packed on average over a window: what is
# not packed while it is measured harms nothing there, and at the budget's context it does.
VISIBLE = 0.2
WEIGHTS = ("int8", "nf4")
# what keeping the weights, or the cache, as they are forbids
KEEP = {"weights": ("heads", "ffn", "weights"), "cache": ("heads", "cache", "window")}

Offer = Callable[[Layer, int], list]
OFFERS: dict[str, Offer] = {}


def offer(*fields: str) -> Callable[[Offer], Offer]:
    """Decorator: the function gives the values that these fields may have in a layer beside its
    own; harm is measured on windows of so many tokens. Unsupported where the class has none."""

    def add(function: Offer) -> Offer:
        OFFERS.update(dict.fromkeys(fields, function))
        return function

    return add


@offer("kv_heads")
def kv_heads(layer: Layer, length: int) -> list[int]:
    """Every divisor of the present number."""
    if layer.family.gqa:
        raise Unsupported(layer.family.gqa)
    uneven.check(layer.config, {})
    if layer.k_norm is not None and any(
        p.numel() != layer.head_dim for p in layer.k_norm.parameters()
    ):
        raise Unsupported("its keys have a norm over all heads")
    own = layer.kv_heads
    return [n for n in range(own - 1, 0, -1) if own % n == 0]


@offer("ffn")
def ffn(layer: Layer, length: int) -> list[int]:
    """Multiples of 64 (of a sixteenth, where there are fewer than that)."""
    uneven.check(layer.config, {})
    own = layer.feed_forward.size
    step = FFN_STEP if own > 2 * FFN_STEP else max(1, own // 16)
    widths = [int(own * share) // step * step for share in FFN_SHARES]
    return [width for width in dict.fromkeys(widths) if 0 < width < own]


@offer("cache")
def cache(layer: Layer, length: int) -> list[str]:
    """Formats, from the best to the smallest, of which enough is packed in a window."""
    residual = max(1, length // RESIDUAL)
    found = []
    for spec in (*FORMATS, *(one.format(residual) for one in RESIDUALS)):
        try:
            kind = caches.parse(spec)
            assert kind is not None
            format = kind.fit(layer).format
        except ValueError:  # its bits or its rotation do not go with this size of heads
            continue
        if not format.lacking(layer.q.like.device) and visible(format, length) >= VISIBLE:
            found.append(spec)
    if not found:
        raise Unsupported(
            f"in windows of {length:,} tokens too few are packed for what that harms to be seen"
        )
    return found


def visible(format: Format, length: int) -> float:
    """The share of a query's past that is packed, mean over a window of `length` tokens."""
    return sum(format.held(seen)[1] / seen for seen in range(1, length + 1)) / length


@offer("window")
def window(layer: Layer, length: int) -> list[int]:
    """Windows in which what is lost can be measured: shares of `length`."""
    own = layer.own_window or length
    return [size for share in WINDOWS if 0 < (size := length // share) < own]


@offer("attention_weights", "ffn_weights")
def weights(layer: Layer, length: int) -> list[str]:
    """bitsandbytes' formats."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Unsupported("bitsandbytes is not installed")
    return list(WEIGHTS)


def go_together(choice: LayerChoice) -> bool:
    """Whether a layer can have all of a choice at once: a window with first tokens keeps its keys
    before their rotation, which a format that mixes a key's dimensions does not."""
    kind = caches.parse(choice.cache)
    return choice.window is None or kind is None or "k" not in kind.format.rotate


def axes_of(
    allow: Collection[str] | None, forbid: Collection[str] = (), keep: str | None = None
) -> list[str]:
    """The axes that are searched. ValueError for names that are none, and when none is left."""
    known = list(dict.fromkeys(AXES.values()))
    for argument, names in (("allow", allow or ()), ("forbid", forbid)):
        for name in names:
            check_choice(argument, name, known)
    if keep is not None:
        check_choice("keep", keep, KEEP)
    gone = {*forbid, *(KEEP[keep] if keep else ())}
    found = [name for name in (known if allow is None else allow) if name not in gone]
    if not found:
        raise ValueError(
            f"allow, forbid: no axis is left to search, valid are some of {', '.join(known)}"
        )
    return found


def candidates(
    parts: anatomy.Anatomy, axes: Collection[str], length: int, named: bool = False
) -> list[dict[str, list]]:
    """For each layer, field -> the values to try. named: the axes were asked for by name, so that
    one that the class cannot have is Unsupported instead of left out."""
    found: list[dict[str, list]] = []
    for layer in parts:
        own = {}
        for name, function in OFFERS.items():
            if AXES[name] not in axes:
                continue
            try:
                _check_plain(layer)
                own[name] = function(layer, length)
            except Unsupported as error:
                if named:
                    raise Unsupported(
                        f"allow: {AXES[name]!r}: {type(parts.model).__name__} cannot have it: "
                        f"{error}"
                    ) from None
        found.append({name: values for name, values in own.items() if values})
    if not any(found):
        raise Unsupported(
            f"{type(parts.model).__name__}: nothing of {', '.join(axes)} can be changed in it"
        )
    return found


def _check_plain(layer: Layer) -> None:
    """Unsupported for weights that are no plain linears."""
    modules = [*layer.qkv_modules, *layer.feed_forward.inputs, layer.feed_forward.output]
    odd = next((module for module in modules if not is_plain(module)), None)
    if odd is not None:
        raise Unsupported(f"layer {layer.index}: {type(odd).__name__} is no plain linear layer")
