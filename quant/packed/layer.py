"""A packed cache by itself, for one call of `generate`:

    model.generate(ids, past_key_values=effattn.quant.cache(model, bits=4))

`effattn.swap(model, cache="int4")` makes the same cache the model's own, which every call uses
then. Either way, a layer of it is an `effattn.hf.state_layer.StateLayer` around a `PackedState` or
a `PackedRing`: what its `update` hands on, only effattn's attention function can read."""

from __future__ import annotations

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from effattn.errors import Unsupported
from effattn.hf import anatomy, caches, hooks, state_layer
from effattn.hf.cache import new_layer
from effattn.hf.swapped_layer import SwappedLayer
from effattn.quant.formats import BITS
from effattn.specs import format_spec, parse_spec
from effattn.surgery import plan as planning
from effattn.surgery.swapping import swap


def cache(
    model: nn.Module,
    spec: str | dict[str | int, str] | None = None,
    *,
    bits: int | None = None,
    max_length: int | None = None,
    **options,
) -> DynamicCache:
    """An empty cache of packed keys and values for `model`, for one batch of sequences.

    spec: "int4(group=64, residual=128)", or a dict from layers to specs as in `swap`; or else bits
    (8, 4 or 2). `options` are those of `Format.options`. Layers that a dict does not name hold full
    precision.

    max_length: tokens in all. A static cache then (`effattn.quant.packed.static`): room is
    allocated at once, and a decoding step compiles as one graph. All layers must be packed, and see
    everything.

    Packed keys can only be read by effattn's attention: a model that is not swapped is swapped to
    "dense" here, which computes what it computed before, with caches as before; `effattn.restore`
    undoes it. Returns transformers' DynamicCache, with one of our layers for each one that is
    packed. Raises ValueError and Unsupported as `swap(cache=...)` does, before anything is changed.
    Source: KIVI, arXiv:2402.02750."""
    parts = anatomy.of(model)
    spec = _spec(spec, bits, options)
    asked = caches.parse(spec, len(parts.layers))
    formats = {
        index: plan.cache for index, plan in planning.make(parts, None, {}, cache=asked).items()
    }
    if not any(formats.values()):
        raise ValueError(
            f"cache: got {spec!r}, which packs nothing; transformers.DynamicCache() does that"
        )
    held = {layer.index: getattr(layer.attention, hooks.ATTRIBUTE, None) for layer in parts.layers}
    for index, one in formats.items():
        raw = held[index] is not None and held[index].rotary is not None
        if one is not None and one.raw_keys and not raw and parts.layers[index].rotary is not None:
            raise Unsupported(
                f"cache: layer {index}: pre_rope=True needs a model that hands over its keys "
                f"before their rotation; valid is effattn.swap(model, cache={spec!r}), after "
                "which generate() makes such caches by itself"
            )
    if max_length is not None:
        _check_static(parts, formats, held, max_length)
    plain = [
        i
        for i, one in formats.items()
        if one is not None and (held[i] is None or held[i].backend is None)
    ]
    if plain:
        swap(model, {",".join(map(str, plain)): "dense"})
    made = DynamicCache(config=model.config)
    made.layers = [
        _layer(getattr(layer.attention, hooks.ATTRIBUTE), formats.get(layer.index), own, max_length)
        for layer, own in zip(parts.layers, made.layers, strict=True)
    ]
    return made


def _check_static(parts: anatomy.Anatomy, formats: dict, held: dict, max_length: int) -> None:
    """Raises for what a static cache cannot be."""
    if type(max_length) is not int or max_length < 1:
        raise ValueError(
            f"cache: max_length: got {max_length!r}, valid is a whole number of at least 1 token"
        )
    for layer in parts.layers:
        swapped, format = held[layer.index], formats.get(layer.index)
        backend = None if swapped is None else swapped.backend
        if format is None:
            raise ValueError(
                f"cache: layer {layer.index} is not packed; with max_length, all layers must be"
            )
        if _forgets(layer, swapped, max_length):
            own = backend is None or swapped.own_window is not None
            pattern = f"sliding(window={layer.own_window})" if own else swapped.pattern
            raise Unsupported(
                f"cache: layer {layer.index} ({pattern}) forgets tokens, and a static cache is "
                "for layers that see everything; leave out max_length: rings have a bounded size "
                "anyway"
            )
        if format.static_state(max_length) is None:
            raise Unsupported(
                f"cache: layer {layer.index}: {format.spec!r} has no static form; leave out "
                "max_length"
            )
        if format.raw_keys or (swapped is not None and swapped.raw_keys):
            raise Unsupported(
                f"cache: layer {layer.index}: max_length and raw keys (pre_rope) cannot be combined"
            )


def _forgets(layer: anatomy.Layer, swapped: SwappedLayer | None, max_length: int) -> bool:
    """Whether a layer sees less than all of `max_length` tokens."""
    if swapped is None or swapped.backend is None or swapped.pattern == "dense":
        return layer.own_window is not None and layer.own_window < max_length
    return swapped.backend.new_state().evicts


def _layer(
    swapped: SwappedLayer,
    format: caches.LayerCache | None,
    own: CacheLayerMixin,
    max_length: int | None,
) -> CacheLayerMixin:
    """The layer for one format; `own` is what plain transformers has there."""
    if max_length is not None:
        state = format.static_state(max_length)
        return state_layer.FixedLayer(swapped.index, swapped.holds, state, format, given=True)
    if format is not None:
        return state_layer.StateLayer(
            swapped.index, swapped.holds, format.new_state(swapped.backend), format, given=True
        )
    if swapped.backend is None:
        return own
    if swapped.cache is None:
        return new_layer(swapped)
    return state_layer.StateLayer(
        swapped.index, swapped.holds, swapped.backend.new_state(), given=True
    )


def _spec(
    spec: str | dict[str | int, str] | None, bits: int | None, options: dict
) -> str | dict[str | int, str]:
    if (spec is None) == (bits is None):
        raise ValueError(
            f"cache: got {'neither' if bits is None else 'both'} of spec and bits; valid is one "
            "of them"
        )
    if bits is not None:
        if type(bits) is not int or bits not in BITS:
            raise ValueError(
                f"cache: bits: got {bits!r}, valid are {', '.join(map(str, BITS))}; fp8 is a "
                "spec, 'fp8'"
            )
        return format_spec(BITS[bits], options)
    if isinstance(spec, dict) and options:
        raise ValueError(
            f"cache: {', '.join(options)} given beside a dict of layers; write them into its specs"
        )
    if not options:
        return spec
    name, given = parse_spec(spec)
    if twice := sorted(given.keys() & options.keys()):
        raise ValueError(f"cache: {', '.join(twice)} given twice, in the spec and as an argument")
    return format_spec(name, given | options)
