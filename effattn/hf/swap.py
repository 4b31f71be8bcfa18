"""Swapping the attention of a live transformers model, and undoing it.

    effattn.swap(model, "dense")                                  # in place, returns the model
    effattn.swap(model, {"0-3": "dense", "4-": "dense(impl='torch')"})
    effattn.restore(model)                                        # bit-identical logits

Everything is checked before anything is changed. Modules, parameters and hooks stay as they are: a swap is a plain
attribute on each attention module, plus the model's attention implementation. `effattn.hf.live` runs it.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from torch import Tensor, nn

from effattn import registry
from effattn.errors import Unsupported, check_choice
from effattn.hf import anatomy, live
from effattn.interface import Backend

HEADS = ("mha", "gqa", "mqa", "mla")
POSITIONS = ("pi", "ntk", "dynamic_ntk", "yarn", "abf", "rerope", "leaky_rerope", "logn", "alibi", "nope")
CACHES = ("full", "int8", "int4", "int2", "fp8")
PROJECTIONS = ("dense", "monarch")


@dataclass
class Swap:
    """What `swap` did to a model: the implementation it had, and the spec of every swapped layer."""

    original: str
    specs: dict[int, str]


def swap(
    model: nn.Module,
    pattern: str | dict[str | int, str] | None = None,
    *,
    positions: str | None = None,
    cache: str | None = None,
    heads: str | None = None,
    projections: str | None = None,
    calibration: Tensor | None = None,
    **options,
) -> nn.Module:
    """Replaces parts of the model's attention, in place. Returns the model.

    pattern: a backend's name or spec for all layers (`options` go to it), or a dict from layers ("3", "0-3", "4-",
    "0-2,5") to specs; layers that no key names keep what they have. heads: "mha", "mqa" or "gqa(kv_heads=...)", which
    `convert_gqa` does with `calibration` (tokens, int64 (N,)); `restore` does not undo it.

    Raises ValueError for arguments that mean nothing, Unsupported for what this model or version cannot do.
    """
    _refuse_planned("positions", positions, POSITIONS)
    _refuse_planned("cache", cache, CACHES, own="full")
    _refuse_planned("projections", projections, PROJECTIONS, own="dense")
    if pattern is None and heads is None:
        raise ValueError(f"swap: nothing to do; give pattern (one of {', '.join(registry.backends())}) or heads")
    parts = anatomy.of(model)
    new = {} if pattern is None else _backends(pattern, options, len(parts.layers))
    if pattern is None and options:
        raise ValueError(f"swap: {', '.join(options)} given without a pattern")
    _refuse_impossible(parts, new)
    if heads is not None:
        _convert_heads(model, parts, heads, calibration)
    if new:
        _apply(model, parts, new)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes every pattern swap: the attention implementation is what it was. Returns the model, swapped or not."""
    done = active(model)
    if done is not None:
        for layer in anatomy.of(model).layers:
            layer.attention.__dict__.pop(live.ATTRIBUTE, None)
        delattr(model, live.ATTRIBUTE)
        model.set_attn_implementation(done.original)
    return model


def active(model: nn.Module) -> Swap | None:
    """What `swap` did to the model's patterns; None when nothing is swapped."""
    return getattr(model, live.ATTRIBUTE, None)


def is_plain(spec: str) -> bool:
    """Whether plain transformers, on a full-attention layer, computes the same as this backend."""
    return registry.backends()[registry.parse_spec(spec)[0]].plain


def _apply(model: nn.Module, parts: anatomy.Anatomy, new: dict[int, tuple[str, Backend]]) -> None:
    live.register()
    done = active(model) or Swap(model.config._attn_implementation, {})
    done.specs.update({index: spec for index, (spec, _) in new.items()})
    for layer in parts.layers:
        old = getattr(layer.attention, live.ATTRIBUTE, None)
        backend = new[layer.index][1].to(layer.q.weight.device) if layer.index in new else old and old.backend
        first = layer.index == min(done.specs)
        setattr(layer.attention, live.ATTRIBUTE, live.LayerSwap(layer.index, backend, done.original, first))
    setattr(model, live.ATTRIBUTE, done)
    model.set_attn_implementation(live.NAME)


def _backends(pattern: str | dict, options: dict, layers: int) -> dict[int, tuple[str, Backend]]:
    """layer -> (its full spec, a backend of its own)."""
    if isinstance(pattern, dict) and options:
        raise ValueError(f"swap: {', '.join(options)} given beside a dict of layers; write them into its specs")
    chosen = parse_layers(pattern, layers) if isinstance(pattern, dict) else dict.fromkeys(range(layers), pattern)
    result = {}
    for index, spec in chosen.items():
        name, given = registry.parse_spec(spec)
        result[index] = (registry.format_spec(name, given | options), registry.backend(spec, **options))
    return result


def parse_layers(pattern: dict[str | int, str], layers: int) -> dict[int, str]:
    """{"0-3": a, "6-": b} -> {0: a, ..., 6: b, ...}. ValueError for overlaps and layers that do not exist."""
    if not pattern:
        raise ValueError('pattern: got an empty dict, valid is for example {"0-3": "dense", "4-": "dense"}')
    chosen, owner = {}, {}
    for key, spec in pattern.items():
        for part in str(key).split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(-\s*(\d+)?)?\s*", part)
            if not match:
                raise ValueError(f'pattern: got layers {key!r}, valid are "3", "0-3", "4-" and lists such as "0-2,5"')
            first = int(match[1])
            last = first if not match[2] else int(match[3]) if match[3] else layers - 1
            if first >= layers or last >= layers or last < first:
                raise ValueError(f"pattern: got layers {key!r}, the model has layers 0 to {layers - 1}")
            for index in range(first, last + 1):
                if index in chosen:
                    raise ValueError(f"pattern: layer {index} is in both {owner[index]!r} and {key!r}")
                chosen[index], owner[index] = spec, key
    return dict(sorted(chosen.items()))


def _refuse_planned(argument: str, spec: str | None, valid: tuple[str, ...], own: str | None = None) -> None:
    """`own` is the name of what every model has."""
    if spec not in (None, own):
        check_choice(argument, registry.parse_spec(spec)[0], valid)
        has = "None" if own is None else f"None or {own!r}"
        raise Unsupported(f"{argument}: {spec!r} is planned, not in this version; valid is {has} (what the model has)")


def _refuse_impossible(parts: anatomy.Anatomy, new: dict[int, tuple[str, Backend]]) -> None:
    """Raises Unsupported, naming the model and every layer concerned, before anything is changed."""
    reasons: dict[str, list[int]] = {}
    for index in new:
        if reason := _obstacle(parts.layers[index]):
            reasons.setdefault(reason, []).append(index)
    if reasons:
        text = "; ".join(f"layers {', '.join(map(str, where))}: {reason}" for reason, where in reasons.items())
        free = [index for index in range(len(parts.layers)) if not _obstacle(parts.layers[index])]
        hint = f'; these can be swapped: {{"{",".join(map(str, free))}": ...}}' if free else ""
        raise Unsupported(f"{type(parts.model).__name__} cannot be swapped, {text}{hint}")


def _obstacle(layer: anatomy.Layer) -> str | None:
    """Why dense cannot stand in for this layer's attention; None when it can."""
    code = inspect.unwrap(type(layer.attention).forward).__code__
    if "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return f"{type(layer.attention).__name__} does not go through transformers' ALL_ATTENTION_FUNCTIONS"
    if layer.softcap is not None:
        return f"its scores are soft-capped (attn_logit_softcapping={layer.softcap})"
    if layer.learned_sinks:
        return "it has learned sinks (s_aux)"
    if layer.window is not None and layer.window < layer.config.max_position_embeddings:
        return f"it is a sliding window of {layer.window}, dense only replaces full attention"
    return None


def _convert_heads(model: nn.Module, parts: anatomy.Anatomy, spec: str, calibration: Tensor | None) -> None:
    name, options = registry.parse_spec(spec)
    check_choice("heads", name, HEADS)
    if name == "mla":
        raise Unsupported("heads: 'mla' is planned, not in this version; valid are 'mha', 'gqa(kv_heads=...)', 'mqa'")
    if name == "gqa" and "kv_heads" not in options:
        raise ValueError(f"heads: got {spec!r}, kv_heads must be given, for example gqa(kv_heads=2)")
    if name != "gqa" and "kv_heads" in options:
        raise ValueError(f"heads: got {spec!r}, {name} takes no kv_heads")
    if name == "mha" and parts.kv_heads == parts.heads:
        return
    from effattn.heads.gqa import convert_gqa

    kv_heads = options.pop("kv_heads", 1 if name == "mqa" else parts.heads)
    valid = [o for o in inspect.signature(convert_gqa).parameters if o not in ("model", "calibration", "progress")]
    for option in options:
        check_choice(f"heads: {name}: option", option, valid)
    convert_gqa(model, kv_heads=kv_heads, calibration=calibration, **options)
