"""Swapping the attention of a live transformers model, and undoing it.

    effattn.swap(model, "sliding", window=512, sinks=4)           # in place, returns the model
    effattn.swap(model, {"0-3": "dense", "4-": "sliding(window=512)"})
    effattn.restore(model)                                        # bit-identical logits

Everything is checked before anything is changed (`effattn.surgery.plan`). Patterns, positions and
caches are hung on the model (`effattn.surgery.attaching`). Heads and projections become other
weights instead, which is not undone (`effattn.heads.gqa`, `effattn.surgery.replace`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from effattn import registry
from effattn.errors import Unsupported
from effattn.heads.kinds.base import KINDS, Change
from effattn.hf import anatomy, caches, hooks, latents, placement
from effattn.hf import positions as positioning
from effattn.hf.adapters import require_own_weights, require_unwrapped
from effattn.hf.beginning import settled
from effattn.specs import parse_spec
from effattn.states.caches import kinds
from effattn.surgery import codebooks, projecting, replace
from effattn.surgery import plan as planning
from effattn.surgery.attaching import active, attach, detach
from effattn.surgery.plan import LayerPlan
from effattn.surgery.record import learned, mark

__all__ = ["active", "restore", "swap", "unswapped"]

ANOTHER_CLASS = "mla"  # heads that need a model of another class, which no swap can make


def swap(
    model: nn.Module,
    pattern: str | dict[str | int, str] | None = None,
    *,
    positions: str | dict[str | int, str] | None = None,
    cache: caches.Asked | dict[str | int, caches.Asked] | None = None,
    heads: str | None = None,
    projections: str | dict[str | int, str] | None = None,
    calibration: Tensor | None = None,
    bos: bool | None = None,
    **options,
) -> nn.Module:
    """Replaces parts of the model's attention, in place. Returns the model.

    model: a transformers causal LM, or an encoder for bidirectional patterns.

    pattern: a backend's name or spec for all layers (`options` go to it), or a dict from layers
    ("3", "0-3", "4-", "0-2,5") to specs; layers that no key names keep what they have. "dense"
    computes what plain transformers does: in a layer that the model itself restricts to a window it
    is `sliding` with that window; any other pattern replaces the window. Causal models get caches
    that fit (`effattn.new_cache`); encoders are swapped with causal=False.

    Patterns that quantize keys ("vq") fit their codebooks to the keys that the model makes of
    `calibration` (tokens, int64 (N,)); without it codebooks are random, which a warning says, until
    the backends' own `calibrate` fills them.

    positions: a rule of `effattn.positions.rules()` for all layers that it makes sense in, or a
    dict as for patterns: "yarn(factor=8)", "rerope(window=256)+logn"; "rope" is the model's own. A
    rule for longer sequences makes sense in layers with full attention, where others have a window
    of their own. A rule that transformers has is written into the config, and the model stays
    plain; any other needs swapped attention, "dense" where no pattern is named.

    cache: "int8", "int4", "int2" or "fp8", with the options of `effattn.quant.Format.options`, such
    as "int4(group=64, residual=128)"; "paged(page=16)"; "evict(policy='snapkv', keep=0.5)", or what
    `effattn.kvpress(press)` gives; or a dict as for patterns. "full" is the pattern's own. Layers
    without a pattern get "dense" for it.

    heads: "mha", "mqa" or "gqa(kv_heads=...)", which `convert_gqa` does with `calibration` (tokens,
    int64 (N,)); or "latent(ratio=0.5)", with which r numbers are remembered of a token, in every
    layer: `rank`, `bytes` (a token, in all layers), `ratio` (of what the cache takes now) or
    `energy`, and the other options of `convert_latent`. Layers without a pattern get "dense" for
    it.

    projections: "lowrank(ratio=0.75)" or "monarch(blocks=16)" for all layers, or a dict as for
    patterns; options are those of `LowRankLinear.options` and `MonarchLinear.options`. q, k, v and
    o become new modules (`effattn.projections`), without the hooks that the linears had; keys and
    values that are latents stay. "dense" multiplies them out. Heads are changed first, so that both
    may be asked for in one call.

    bos: whether BOS takes the place of the first token of each window of `calibration` (None: as
    the model's tokenizer does it).

    `restore` undoes neither heads nor projections: their old weights are gone.
    Raises ValueError for arguments that mean nothing, Unsupported for what this model or version
    cannot do."""
    _check_asked(pattern, options, (positions, cache, heads, projections))
    # Plans first, which refuse; then what rewrites weights, undone where a part of it fails; then
    # what is hung on the model.
    require_unwrapped(model)
    if heads is not None or projections is not None:
        require_own_weights(model)
    parts = anatomy.of(model)
    placed = None if positions is None else positioning.make(parts, positions)
    cached = None if cache is None else caches.parse(cache, len(parts.layers))
    change = None if heads is None else _change(parts, heads)
    plan = partial(
        planning.make,
        pattern=pattern,
        options=options,
        positions=None if placed is None else placed.layers,
        cache=cached,
        latent=change is not None and change.latent,
    )
    plans = plan(parts)
    if any(one.own_global for one in plans.values()):  # which start as copies of the first
        require_own_weights(model)
    codebooks.check(parts, plans, calibration)
    projected = None
    if projections is not None:
        if change is not None and change.latent:
            raise Unsupported(
                "swap: got latent heads and projections, valid is one call for each, heads first"
            )
        kv_heads = None if change is None else change.kv_heads
        placement.require_here(parts.model, "projections")
        projected = replace.make(parts, projections, calibration, kv_heads, plans)
    with settled(model, bos):
        if change is not None or projected is not None:
            _rewrite(parts, change, projected, calibration)
        if change is not None and plans:  # some backends hold something for each K/V head
            plans = plan(anatomy.of(model))
        _carry_out(parts, placed, plan, plans, calibration)
    mark(model)
    codebooks.warn_of_random(plans, calibration)
    return model


def _check_asked(pattern, options: dict, others: tuple) -> None:
    """ValueError for a call that asks for nothing, and for options that belong to no pattern."""
    if pattern is None and all(axis is None for axis in others):
        raise ValueError(
            f"swap: nothing to do; give pattern (one of {', '.join(registry.backends())}), "
            "positions, cache, heads or projections"
        )
    if pattern is None and options:
        raise ValueError(f"swap: {', '.join(options)} given without a pattern")


def _carry_out(
    parts: anatomy.Anatomy,
    placed: positioning.PositionPlan | None,
    plan: Callable[[anatomy.Anatomy], dict[int, LayerPlan]],
    plans: dict[int, LayerPlan],
    calibration: Tensor | None,
) -> None:
    """Positions, and then patterns and caches: all, or where one fails none."""
    model = parts.model
    before = positioning.active(model)
    try:
        if placed is not None:
            positioning.apply(model, parts, placed)
            # windows that no sequence exceeded may be exceeded now
            if placed.config is not None and plans:
                plans = plan(anatomy.of(model))
        if plans:
            if calibration is not None and codebooks.wanting(plans):
                codebooks.fit(model, parts, plans, calibration)
            attach(model, parts, plans)
    except BaseException:
        if placed is not None:
            positioning.put_back(model, parts, before)
        raise


def remember_latents(model: nn.Module) -> nn.Module:
    """Gives a model whose keys and values are latents the cache that holds them, in each layer
    beside the pattern that it has. Returns the model. Raises Unsupported for patterns that remember
    something else."""
    parts = anatomy.of(model)
    attach(parts.model, parts, planning.make(parts, None, {}, latent=True))
    mark(model)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes every swap of patterns, positions and caches: attention implementation and config are
    what they were. Returns the model, swapped or not."""
    require_unwrapped(model)
    positioning.undo(model)
    detach(model)
    mark(model)
    return model


@contextmanager
def unswapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model restored, to be swapped at will while open; what it was swapped with before comes
    back afterwards. Unsupported for a swap that has learned something, which would be lost."""
    before, had_latents = _axes(model), bool(latents.record(model))
    if names := sorted(learned(model)):
        raise Unsupported(
            f"model: it is swapped, and the swap has weights of its own ({names[0]}, ...), which a "
            "second one would lose; effattn.restore(model) first, or give a copy"
        )
    try:
        yield restore(model)
    finally:
        restore(model)
        if before:
            swap(model, **before)
        if had_latents:
            remember_latents(model)


def _axes(model: nn.Module) -> dict[str, Any]:
    """What a model is swapped with, as `swap` takes it: {axis: {layer: what was asked for}}."""
    done, rules = active(model), positioning.active(model)
    found: dict[str, Any] = {"positions": {} if rules is None else rules.specs}
    if done is not None:
        layers = anatomy.of(model).layers
        found["pattern"] = done.specs
        # a cache that was made of an object has no spec that says it again
        found["cache"] = {
            index: spec
            if spec.partition("(")[0] in kinds()
            else getattr(layers[index].attention, hooks.ATTRIBUTE).cache
            for index, spec in done.caches.items()
        }
    return {axis: dict(specs) for axis, specs in found.items() if specs}


def _rewrite(
    parts: anatomy.Anatomy,
    change: Change | None,
    projected: replace.Replacement | None,
    calibration,
) -> None:
    """Changes heads, and then projections: both, or where one fails neither."""
    # at its use: what it imports is heavy, and most swaps have nothing to do with heads
    from effattn.heads.undo import all_or_nothing

    with all_or_nothing(parts) as undo:
        for layer in parts if change is not None and projected is not None else ():
            undo.remember(layer, ffn=bool(layer.family.ffn_in))
        if change is not None:
            change.convert(parts.model, calibration=calibration)
        if projected is not None:
            replace.replace(parts.model, projecting.fit(projected))


def _change(parts: anatomy.Anatomy, spec: str) -> Change | None:
    """What a spec of heads comes to; None when there is nothing to do."""
    name, options = parse_spec(spec)
    if name == ANOTHER_CLASS:
        valid = ", ".join(f"{kind!r}" for kind in KINDS.members())
        raise Unsupported(
            f"heads: {name!r} needs a model of another class, which a swap cannot make in place; "
            "effattn.convert_mla(model, tokens, rank=..., rope_dim=...) returns one; valid here "
            f"are {valid}"
        )
    return KINDS.find(name).change(parts, spec, options)
