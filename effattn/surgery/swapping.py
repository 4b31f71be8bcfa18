"""Swapping the attention of a live transformers model, and undoing it.

    effattn.swap(model, "sliding", window=512, sinks=4)           # in place, returns the model
    effattn.swap(model, {"0-3": "dense", "4-": "sliding(window=512)"})
    effattn.restore(model)                                        # bit-identical logits

Everything is checked before anything is changed (`effattn.surgery.plan`). Modules and parameters
stay as they are: a swap is the model's attention implementation, a plain attribute and a forward
pre-hook on each swapped attention module (`effattn.hf.hooks`), and submodules for what a method
learns. `effattn.hf.live` runs it. Heads and projections become other weights instead, which is not
undone (`effattn.heads.gqa`, `effattn.surgery.replace`)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from effattn import registry
from effattn.errors import Unsupported, check_choice
from effattn.hf import anatomy, caches, hooks, live
from effattn.hf import positions as positioning
from effattn.hf.adapters import require_own_weights, require_unwrapped
from effattn.surgery import codebooks, replace
from effattn.surgery import plan as planning
from effattn.surgery.plan import Plan, parse_layers
from effattn.surgery.record import is_plain, mark

__all__ = ["Swap", "active", "is_plain", "parse_layers", "restore", "swap"]

HEADS = ("mha", "gqa", "mqa", "mla")
# transformers' way into continuous batching, which is closed while swapped
BATCHING = "init_continuous_batching"


@dataclass
class Swap:
    """What `swap` did to a model: the implementation it had, and as asked for the spec of every
    swapped layer, and of every cache that is not its pattern's own."""

    original: str
    specs: dict[int, str]
    caches: dict[int, str] = field(default_factory=dict)
    # The layers that look at position_ids for all: parts of the model, which no two swaps have in
    # common.
    checkers: list[live.LayerSwap] = field(default_factory=list, compare=False)


def swap(
    model: nn.Module,
    pattern: str | dict[str | int, str] | None = None,
    *,
    positions: str | dict[str | int, str] | None = None,
    cache: str | dict[str | int, str] | None = None,
    heads: str | None = None,
    projections: str | dict[str | int, str] | None = None,
    calibration: Tensor | None = None,
    **options,
) -> nn.Module:
    """Replaces parts of the model's attention, in place. Returns the model.

    pattern: a backend's name or spec for all layers (`options` go to it), or a dict from layers
    ("3", "0-3", "4-", "0-2,5") to specs; layers that no key names keep what they have. "dense"
    computes what plain transformers does: in a layer that the model itself restricts to a window it
    is `sliding` with that window; any other pattern replaces the window. Causal models get caches
    that fit (`effattn.new_cache`); encoders are swapped with causal=False.

    Patterns that quantize keys ("vq") fit their codebooks to the keys that the model makes of
    `calibration` (tokens, int64 (N,)); without it codebooks are random, until the backends' own
    `calibrate` or a checkpoint fills them.

    positions: a rule of `effattn.positions.rules()` for all layers that it makes sense in, or a
    dict as for patterns: "yarn(factor=8)", "rerope(window=256)+logn"; "rope" is the model's own. A
    rule that transformers has is written into the config, and the model stays plain; any other
    needs swapped attention, "dense" where no pattern is named.

    cache: "int8", "int4", "int2" or "fp8", with the options of `effattn.quant.Format.options`, such
    as "int4(group=64, residual=128)", or a dict as for patterns; "full" is the pattern's own.
    Layers without a pattern get "dense" for it.

    heads: "mha", "mqa" or "gqa(kv_heads=...)", which `convert_gqa` does with `calibration` (tokens,
    int64 (N,)).

    projections: "monarch(blocks=16)" for all layers, or a dict as for patterns; options and what
    they mean are those of `effattn.surgery.replace.monarch` (rank, ratio, ffn, method, pad). q,
    k, v and o become new modules (`effattn.projections.MonarchLinear`), without the hooks that the
    linears had. "dense" multiplies them out. Heads are changed first, so that both may be asked for
    in one call.

    `restore` undoes neither heads nor projections: their old weights are gone.

    Raises ValueError for arguments that mean nothing, Unsupported for what this model or version
    cannot do."""
    if all(axis is None for axis in (pattern, positions, cache, heads, projections)):
        raise ValueError(
            f"swap: nothing to do; give pattern (one of {', '.join(registry.backends())}), "
            "positions, cache, heads or "
            "projections"
        )
    if pattern is None and options:
        raise ValueError(f"swap: {', '.join(options)} given without a pattern")
    require_unwrapped(model)
    if heads is not None or projections is not None:
        require_own_weights(model)
    parts = anatomy.of(model)
    order = None if positions is None else positioning.make(parts, positions)
    cached = None if cache is None else caches.parse(cache, len(parts.layers))
    plans = planning.make(parts, pattern, options, order and order.layers, cached)
    # second projections start as copies of the first
    if any(plan.own_global for plan in plans.values()):
        require_own_weights(model)
    codebooks.check(parts, plans, calibration)
    merging = None if heads is None else _merging(parts, heads)
    kv_heads = None if merging is None else merging["kv_heads"]
    projected = (
        None
        if projections is None
        else replace.make(parts, projections, calibration, kv_heads, plans)
    )
    if merging is not None or projected is not None:
        _rewrite(parts, merging, projected, calibration)
    if merging is not None and plans:  # some backends hold something for each K/V head
        plans = planning.make(anatomy.of(model), pattern, options, order and order.layers, cached)
    before = positioning.active(model)
    try:
        if order is not None:
            positioning.apply(model, parts, order)
            # windows that no sequence exceeded may be exceeded now
            if order.config is not None and plans:
                plans = planning.make(anatomy.of(model), pattern, options, order.layers, cached)
        if plans:
            if calibration is not None and codebooks.wanting(plans):
                codebooks.fit(model, parts, plans, calibration)
            _apply(model, parts, plans)
    except BaseException:
        if order is not None:
            positioning.put_back(model, parts, before)
        raise
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


def detach(model: nn.Module) -> None:
    """Undoes what was done to the attention modules; what is written in the config stays."""
    done = active(model)
    if done is not None:
        for layer in anatomy.of(model).layers:
            _detach(layer.attention)
        _unhook(model)
        model.__dict__.pop(BATCHING, None)
        delattr(model, hooks.ATTRIBUTE)
        model.set_attn_implementation(done.original)


def active(model: nn.Module) -> Swap | None:
    """What `swap` did to the model's patterns; None when nothing is swapped."""
    return getattr(model, hooks.ATTRIBUTE, None)


def require_own_attention(model: nn.Module, name: str) -> None:
    """Unsupported for a checkpoint, called `name`, that comes with a swapped attention."""
    if active(model) is not None:
        raise Unsupported(
            f"model: {name} is swapped already; valid is a checkpoint with its own attention"
        )


def _rewrite(
    parts: anatomy.Anatomy, merging: dict | None, projected: replace.Plan | None, calibration
) -> None:
    """Changes heads, and then projections: both, or where one fails neither."""
    from effattn.heads.gqa import convert_gqa
    from effattn.heads.undo import all_or_nothing

    with all_or_nothing(parts) as undo:
        for layer in parts if merging is not None and projected is not None else ():
            undo.remember(layer)
        if merging is not None:
            convert_gqa(parts.model, calibration=calibration, **merging)
        if projected is not None:
            replace.replace(parts.model, replace.fit(projected))


def _apply(model: nn.Module, parts: anatomy.Anatomy, plans: dict[int, Plan]) -> None:
    # the only part that needs memory comes first
    new = {
        index: hooks.GlobalProjections(parts.layers[index].attention, parts.layers[index].qkv_paths)
        for index, plan in plans.items()
        if plan.own_global
    }
    done = active(model) or Swap(_own_implementation(model), {})
    live.register()
    model.set_attn_implementation(live.NAME)
    done.specs.update({index: plan.spec for index, plan in plans.items()})
    done.caches = {index: spec for index, spec in done.caches.items() if index not in plans}
    done.caches |= {
        index: plan.cache.spec for index, plan in plans.items() if plan.cache is not None
    }
    for layer in parts.layers:
        module, plan = layer.attention, plans.get(layer.index)
        if plan is not None:
            module._modules.pop(hooks.POSITIONS, None)
            if not plan.kept:
                _detach(module)
                _hook(module, hooks.before_attention)
            setattr(
                module,
                hooks.ATTRIBUTE,
                live.LayerSwap(
                    layer.index,
                    done.original,
                    backend=plan.backend,
                    pattern=plan.pattern,
                    raw_keys=plan.raw_keys,
                    rotary=plan.rotary,
                    own_window=plan.own_window,
                    positions=plan.positions,
                    cache=plan.cache,
                ),
            )
            if plan.positions is not None and plan.positions.rule.learned is not None:
                module.add_module(hooks.POSITIONS, plan.positions.rule)
            if any(True for _ in plan.backend.parameters()) or any(
                True for _ in plan.backend.buffers()
            ):
                module.add_module(hooks.PATTERN, plan.backend)
            if layer.index in new:
                module.add_module(hooks.GLOBAL, new[layer.index])
        elif not hasattr(module, hooks.ATTRIBUTE):
            setattr(module, hooks.ATTRIBUTE, live.LayerSwap(layer.index, done.original))
    done.checkers = _choose_checkers(
        [getattr(layer.attention, hooks.ATTRIBUTE) for layer in parts.layers]
    )
    if active(model) is None:
        setattr(model, hooks.ATTRIBUTE, done)
        _hook(model, hooks.before_model)
        model.__dict__[BATCHING] = hooks.refuse_continuous_batching


def _own_implementation(model: nn.Module) -> str:
    """What the model computes attention with; transformers' choice for one built from a swapped
    model's config.
    """
    own = model.config._attn_implementation
    return model.get_correct_attn_implementation(None) if own == live.NAME else own


def _choose_checkers(layers: list[live.LayerSwap]) -> list[live.LayerSwap]:
    """The first swapped layer, and the first that owns its positions, look at position_ids on
    behalf of all.
    """
    swapped = [layer for layer in layers if layer.backend is not None]
    first = swapped[:1] + [layer for layer in swapped if layer.own_positions][:1]
    for layer in layers:
        layer.checks_positions = any(layer is one for one in first)
    return [layer for layer in layers if layer.checks_positions]


def _hook(module: nn.Module, function) -> None:
    handle = module.register_forward_pre_hook(function, with_kwargs=True)
    module.__dict__[hooks.HANDLE] = handle


def _unhook(module: nn.Module) -> None:
    handle: RemovableHandle | None = module.__dict__.pop(hooks.HANDLE, None)
    if handle is not None:
        handle.remove()


def _detach(module: nn.Module) -> None:
    """Takes a swap off an attention module, if there is one."""
    _unhook(module)
    module.__dict__.pop(hooks.ATTRIBUTE, None)
    for name in (hooks.PATTERN, hooks.GLOBAL, hooks.POSITIONS):
        module._modules.pop(name, None)


def _merging(parts: anatomy.Anatomy, spec: str) -> dict | None:
    """The arguments of `convert_gqa` that a spec of heads comes to; None when there is nothing to
    do.
    """
    from effattn.heads.gqa import check_kv_heads, convert_gqa

    name, options = registry.parse_spec(spec)
    check_choice("heads", name, HEADS)
    if name == "mla":
        raise Unsupported(
            "heads: 'mla' is planned, not in this version; valid are 'mha', 'gqa(kv_heads=...)', "
            "'mqa'"
        )
    if name == "gqa" and "kv_heads" not in options:
        raise ValueError(
            f"heads: got {spec!r}, kv_heads must be given, for example gqa(kv_heads=2)"
        )
    if name != "gqa" and "kv_heads" in options:
        raise ValueError(f"heads: got {spec!r}, {name} takes no kv_heads")
    if name == "mha" and parts.kv_heads == parts.heads:
        return None
    valid = [
        o
        for o in inspect.signature(convert_gqa).parameters
        if o not in ("model", "calibration", "progress")
    ]
    for option in options:
        check_choice(f"heads: {name}: option", option, valid)
    arguments = {"kv_heads": 1 if name == "mqa" else parts.heads, **options}
    check_kv_heads(arguments["kv_heads"], parts.kv_heads)
    return arguments
