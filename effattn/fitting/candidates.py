"""What a layer may become: the ladder of each field, as far as the class can have it.

    ladders = candidates(parts, allow=("heads", "cache"), length=512)
    ladders[3]["kv_heads"]          # [4, 2, 1]: all but what the layer is

An axis is offered by one function, `@offer(axis, field)`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection

from torch import nn

from effattn.errors import Unsupported, check_choice
from effattn.fitting import forms as forming
from effattn.fitting.plan import AXES, BLOCKS, LayerChoice, is_structured
from effattn.fitting.plan import WEIGHTS as FORMED
from effattn.heads.latent.converting import check_layer
from effattn.heads.latent.ranks import STEP, full_rank
from effattn.hf import anatomy, uneven
from effattn.hf.layer import Layer
from effattn.hf.weights import is_plain, weight_bytes
from effattn.quant.formats import Format
from effattn.states import caches
from effattn.surgery import plan as planning

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
LENGTH = 512  # tokens of a window, where it decides nothing
WEIGHTS = ("int8", "nf4")
# Ranks of latents on their ladder, as shares of the rank with which nothing is lost.
LATENT_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
PROJECTIONS = ("lowrank(ratio=0.75)", "lowrank(ratio=0.5)", "monarch(blocks=4, ratio=0.5)")
SPARSITIES = ("bitmask(sparsity=0.5)", "bitmask(sparsity=0.7)", "2:4")
# what keeping the weights, or the cache, as they are forbids
KEEP = {
    "weights": ("heads", "latent", "skip", "ffn", "weights", "projections", "sparsity"),
    "cache": ("heads", "latent", "skip", "cache", "window"),
}
# Fields of one layer that do not go together when both are changed. Latents are a memory of their
# own; of a block's weights one thing is fitted, which is what was measured.
APART = (
    ("latent", "kv_heads"),
    ("latent", "cache"),
    ("latent", "window"),
    ("latent", "attention_weights"),
)

Offer = Callable[[Layer, int], list]
OFFERS: dict[tuple[str, str], Offer] = {}


def offer(axis: str, *fields: str) -> Callable[[Offer], Offer]:
    """Decorator: the function gives the values of an axis that these fields may have in a layer
    beside its own; harm is measured on windows of so many tokens. Unsupported where the class has
    none."""

    def add(function: Offer) -> Offer:
        OFFERS.update({(axis, field): function for field in fields})
        return function

    return add


@offer("heads", "kv_heads")
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


@offer("latent", "latent")
def latent(layer: Layer, length: int) -> list[int]:
    """Ranks of latents that remember less than keys and values do, multiples of 8."""
    check_layer(type(layer.attention).__name__, layer)
    if layer.own_window is not None:
        raise Unsupported("its layers have windows of their own")
    most, now = full_rank(layer), 2 * layer.kv_heads * layer.head_dim
    ranks = [int(most * share) // STEP * STEP for share in LATENT_SHARES]
    return [rank for rank in dict.fromkeys(ranks) if 0 < rank < now]


@offer("skip", "kv_heads")
def no_attention(layer: Layer, length: int) -> list[int]:
    """None at all, but in the first layer."""
    if layer.own_window is not None:
        raise Unsupported("transformers keeps a ring for each of its layers, attention or not")
    uneven.check(layer.config, {})
    uneven.check_norms(layer.block, layer.index)
    return [0] if layer.index else []


@offer("skip", "ffn")
def no_ffn(layer: Layer, length: int) -> list[int]:
    """No FFN."""
    uneven.check(layer.config, {})
    uneven.check_norms(layer.block, layer.index)
    return [0]


@offer("ffn", "ffn")
def ffn(layer: Layer, length: int) -> list[int]:
    """Multiples of 64 (of a sixteenth, where there are fewer than that)."""
    uneven.check(layer.config, {})
    own = layer.feed_forward.size
    step = FFN_STEP if own > 2 * FFN_STEP else max(1, own // 16)
    widths = [int(own * share) // step * step for share in FFN_SHARES]
    return [width for width in dict.fromkeys(widths) if 0 < width < own]


@offer("cache", "cache")
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


@offer("window", "window")
def window(layer: Layer, length: int) -> list[int]:
    """Windows in which what is lost can be measured: shares of `length`."""
    own = layer.own_window or length
    return [size for share in WINDOWS if 0 < (size := length // share) < own]


@offer("weights", *FORMED)
def weights(layer: Layer, length: int) -> list[str]:
    """bitsandbytes' formats."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Unsupported("bitsandbytes is not installed")
    return list(WEIGHTS)


@offer("projections", "attention_weights")
def attention_projections(layer: Layer, length: int) -> list[str]:
    """Low rank and Monarch matrices for q, k, v and o."""
    return _smaller(PROJECTIONS, layer.qkv_modules)


@offer("projections", "ffn_weights")
def ffn_projections(layer: Layer, length: int) -> list[str]:
    """The same for the FFN."""
    return _smaller(PROJECTIONS, [*layer.feed_forward.inputs, layer.feed_forward.output])


@offer("sparsity", "attention_weights")
def attention_sparsity(layer: Layer, length: int) -> list[str]:
    """Zeros in q, k, v and o, packed."""
    return _smaller(SPARSITIES, layer.qkv_modules)


@offer("sparsity", "ffn_weights")
def ffn_sparsity(layer: Layer, length: int) -> list[str]:
    """The same in the FFN."""
    return _smaller(SPARSITIES, [*layer.feed_forward.inputs, layer.feed_forward.output])


def _smaller(forms: Collection[str], linears: list[nn.Linear]) -> list[str]:
    """Those forms that these linears can all have, and take fewer bytes in."""
    found, now = [], sum(map(weight_bytes, linears))
    for form in forms:
        try:
            made = [
                forming.empty(form, one, one.out_features, one.in_features, "meta")
                for one in linears
            ]
        except ValueError:  # sizes that do not divide
            continue
        if sum(map(weight_bytes, made)) < now:
            found.append(form)
    if not found:
        raise Unsupported(f"its matrices do not go with any of {', '.join(forms)}")
    return found


def go_together(choice: LayerChoice, own: LayerChoice) -> bool:
    """Whether a layer that is `own` can have all of a choice at once. A window with first tokens
    keeps its keys before their rotation, which a format that mixes a key's dimensions does not; a
    part that is left out has nothing else; what is no plain linear any more has its size."""
    changed = choice.changes(own)
    for block, size in (("attention", "kv_heads"), ("ffn", "ffn")):
        here = [name for name in BLOCKS[block] if name in changed]
        form = f"{block}_weights"
        if changed.get(size) == 0 and len(here) > 1:
            return False
        if form in changed and is_structured(form, changed[form]) and size in changed:
            return False
    if any(one in changed and other in changed for one, other in APART):
        return False
    kind = caches.parse(choice.cache)
    return choice.window is None or kind is None or "k" not in kind.format.rotate


def axes_of(
    allow: Collection[str] | None, forbid: Collection[str] = (), keep: str | None = None
) -> list[str]:
    """The axes that are searched. ValueError for names that are none, and when none is left."""
    known = AXES
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
    unheld = _unheld(parts) if "latent" in axes else None
    for layer in parts:
        own: dict[str, list] = {}
        for (axis, name), function in OFFERS.items():
            if axis not in axes:
                continue
            try:
                _check_plain(layer)
                if axis == "latent" and unheld is not None:
                    raise unheld
                own.setdefault(name, []).extend(function(layer, length))
            except Unsupported as error:
                if named:
                    raise Unsupported(
                        f"allow: {axis!r}: {type(parts.model).__name__} cannot have it: {error}"
                    ) from None
        found.append({name: values for name, values in own.items() if values})
    if not any(found):
        raise Unsupported(
            f"{type(parts.model).__name__}: nothing of {', '.join(axes)} can be changed in it"
        )
    return found


def values_of(parts: anatomy.Anatomy, index: int, axis: str, name: str) -> list:
    """What is offered of an axis for a field of one layer. Unsupported where its class has none."""
    layer = parts.layers[index]
    _check_plain(layer)
    if axis == "latent" and (reason := _unheld(parts)) is not None:
        raise reason
    return OFFERS[axis, name](layer, max(LENGTH, parts.trained_length or 0))


def _unheld(parts: anatomy.Anatomy) -> Unsupported | None:
    """Why no cache of this model could hold latents; None where one can."""
    try:
        planning.make(parts, None, {}, latent=True)
    except Unsupported as error:
        return error
    return None


def _check_plain(layer: Layer) -> None:
    """Unsupported for weights that are no plain linears."""
    modules = [*layer.qkv_modules, *layer.feed_forward.inputs, layer.feed_forward.output]
    odd = next((module for module in modules if not is_plain(module)), None)
    if odd is not None:
        raise Unsupported(f"layer {layer.index}: {type(odd).__name__} is no plain linear layer")
