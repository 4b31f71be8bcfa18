"""What a swap is going to do, layer by layer, and whether it can: all of it before anything is
changed.

`make` reads the patterns, builds a backend for every layer that they name, and tries each on a few
tokens of that layer's head shape, so that what a method cannot do in this model is an error that
names the layer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effattn import registry
from effattn.errors import Unsupported
from effattn.hf import anatomy, caches, hooks, placement
from effattn.hf.positions import LENGTH_DEPENDENT, LayerPositions
from effattn.hf.swapped_layer import state_of
from effattn.interface import Backend
from effattn.kernels.latent import Latent, Maps
from effattn.specs import by_layer, format_spec, parse_spec

TRIED = 4  # tokens of a trial
TRIED_RANK = 64  # numbers of its latents, where nobody knows yet how many there will be


@dataclass
class LayerPlan:
    """One layer's new pattern.

    spec: as asked for. pattern: what it comes to in this layer. raw_keys: whether the backend gets
    q and k before their rotation, and rotary: by what it then rotates them. own_window: the window
    of the layer's own attention, where the backend does the same. own_global, positions, kept,
    cache: see below."""

    spec: str
    pattern: str
    backend: Backend
    raw_keys: bool
    rotary: anatomy.Rotary | None
    own_window: int | None
    own_global: bool  # the layer gets second projections for global tokens
    positions: LayerPositions | None = None
    # the pattern is what the layer has already: the backend stays, and what it has learned
    kept: bool = False
    cache: caches.LayerCache | None = None  # None: what the pattern itself remembers
    latent: int | None = None  # rank of what is remembered instead of keys and values


def make(
    parts: anatomy.Anatomy,
    pattern: str | dict[str | int, str] | None,
    options: dict,
    positions: dict[int, LayerPositions | None] | None = None,
    cache: dict[int, str | caches.LayerCache] | None = None,
    latent: bool = False,
) -> dict[int, LayerPlan]:
    """layer -> its plan. ValueError for what means nothing, Unsupported for what this model or a
    method cannot do.

    positions, cache: the layers whose rule or cache changes. Those that no pattern is named for
    keep the one they have. latent: keys and values are latents by the time this is carried out, in
    all layers unless some have them already, and need a swap for their cache."""
    if isinstance(pattern, dict) and options:
        raise ValueError(
            f"swap: {', '.join(options)} given beside a dict of layers; write them into its specs"
        )
    options = {name: _literal(value) for name, value in options.items()}
    chosen = {} if pattern is None else by_layer(pattern, len(parts.layers))
    chosen = _attending(parts, chosen)
    # 1. The layers that a pattern is named for, and those whose rule or cache changes
    plans = {index: _plan(parts.layers[index], spec, options) for index, spec in chosen.items()}
    positions, cache = _attending(parts, positions or {}), _attending(parts, cache or {})
    formats = {index: caches.fit(parts.layers[index], spec) for index, spec in cache.items()}
    made = any(layer.latent is not None for layer in parts)  # already, perhaps not everywhere
    latents = {
        layer.index: True
        for layer in parts
        if latent and layer.attends and (layer.latent is not None or not made)
    }
    for index, rule in [*positions.items(), *formats.items(), *latents.items()]:
        held = getattr(parts.layers[index].attention, hooks.ATTRIBUTE, None)
        if index not in plans and held is not None and held.backend is not None:
            plans[index] = _keep(parts, index, held)
        elif index not in plans and rule is not None:
            plans[index] = _plan(parts.layers[index], "dense", {})
    # 2. What each of them gets beside its pattern: as asked, or as it was. Who needs raw keys
    #    (sinks, a packed cache before its rotation, a position rule) takes over the model's
    #    rotation.
    for index, plan in plans.items():
        held = getattr(parts.layers[index].attention, hooks.ATTRIBUTE, None)
        plan.cache = formats[index] if index in formats else getattr(held, "cache", None)
        rotary, memory = parts.layers[index].rotary, parts.layers[index].latent
        plan.latent = memory.rank if memory is not None else 0 if latent and not made else None
        # of latents keys are made, and turned, when they are read
        needs_raw = plan.latent is not None or (plan.cache is not None and plan.cache.raw_keys)
        if needs_raw and rotary is not None:
            plan.raw_keys, plan.rotary = True, rotary
        rule = positions[index] if index in positions else getattr(held, "positions", None)
        if rule is not None:
            plan.positions = rule.fitted(plan.raw_keys)
            plan.raw_keys, plan.rotary = plan.positions.raw, None
    # 3. Whether it can be: what is known to be impossible, for all layers at once; then a trial
    _refuse_impossible(parts, plans)
    tried: list[tuple] = []
    for index, plan in plans.items():
        _try_once(parts.layers[index], plan, tried)
    _tie(plans)
    return plans


def _attending(parts: anatomy.Anatomy, chosen: dict[int, Any]) -> dict[int, Any]:
    """Without the layers that have no attention."""
    return {index: one for index, one in chosen.items() if parts.layers[index].attends}


def _tie(plans: dict[int, LayerPlan]) -> None:
    """What a backend shares across layers (its `tied` parameters) becomes one, for all layers of
    the same pattern.
    """
    first: dict[str, Backend] = {}
    for plan in plans.values():
        one = first.setdefault(plan.pattern, plan.backend)
        for name in plan.backend.tied:
            setattr(plan.backend, name, getattr(one, name))
        if plan.backend.tied:  # what transformers reads when it saves: one of the names is enough
            plan.backend._tied_weights_keys = dict(
                zip(plan.backend.tied, plan.backend.tied, strict=True)
            )


def _plan(layer: anatomy.Layer, spec: str, options: dict) -> LayerPlan:
    name, given = parse_spec(spec)
    backend = registry.backend(spec, **options)
    spec, given = format_spec(name, given | options), given | options
    pattern, own = spec, None
    # plain transformers' attention is a window in this layer
    if backend.plain and layer.own_window is not None:
        own = layer.own_window
        windowed = format_spec("sliding", {"window": own} | given)
        backend = registry.backend(windowed)
        # None: only past the trained length, called as asked
        pattern = spec if layer.window is None else windowed
    raw = backend.farthest is not None
    rotary = layer.rotary if raw else None
    return LayerPlan(spec, pattern, backend, raw, rotary, own, "global_qkv" in backend.extras)


def _keep(parts: anatomy.Anatomy, index: int, held) -> LayerPlan:
    """The plan of a layer whose pattern stays. held: its `live.LayerSwap`."""
    spec = getattr(parts.model, hooks.ATTRIBUTE).specs[index]
    raw = held.backend.farthest is not None
    rotary = parts.layers[index].rotary if raw else None
    return LayerPlan(
        spec, held.pattern, held.backend, raw, rotary, held.own_window, False, kept=True
    )


def _literal(value):
    """Options may be tensors (global tokens); a spec, which is also what is saved, has lists of
    numbers.
    """
    if isinstance(value, Tensor):
        return (value.nonzero().flatten() if value.dtype == torch.bool else value).tolist()
    return value


def _refuse_impossible(parts: anatomy.Anatomy, plans: dict[int, LayerPlan]) -> None:
    """Raises Unsupported, naming the model and every layer concerned."""
    reasons: dict[str, list[int]] = {}
    for index, plan in plans.items():
        if reason := _obstacle(parts.layers[index], plan):
            reasons.setdefault(reason, []).append(index)
    if reasons:
        text = "; ".join(
            f"layers {', '.join(map(str, where))}: {reason}" for reason, where in reasons.items()
        )
        free = [index for index, plan in plans.items() if not _obstacle(parts.layers[index], plan)]
        hint = f'; these can be swapped: {{"{",".join(map(str, free))}": ...}}' if free else ""
        raise Unsupported(f"{type(parts.model).__name__} cannot be swapped, {text}{hint}")


def _obstacle(layer: anatomy.Layer, plan: LayerPlan) -> str | None:
    """Why the plan cannot be carried out; None when nothing is known against it."""
    # a class that computes attention by itself would go on doing so: its code tells
    code = inspect.unwrap(type(layer.attention).forward).__code__
    if "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return (
            f"{type(layer.attention).__name__} does not go through transformers' "
            "ALL_ATTENTION_FUNCTIONS"
        )
    if getattr(layer.config, "add_cross_attention", False):
        return "it has cross-attention beside it, which effattn does not swap"
    if layer.softcap is not None and "softcap" not in plan.backend.extras:
        return (
            f"its scores are soft-capped (attn_logit_softcapping={layer.softcap}), "
            f"{plan.backend.name} has no softcap"
        )
    if layer.learned_sinks and "sink_logits" not in plan.backend.extras:
        return f"it has learned sinks (s_aux), {plan.backend.name} has no sink_logits"
    if layer.own_window is not None and not layer.causal:
        return f"it is a bidirectional window of {layer.own_window} of its own"
    if layer.own_window is None and layer.causal and _cache_forgets(layer):
        return (
            f"it has config.sliding_window={layer.config.sliding_window}, which its class leaves "
            "out without a cache and transformers' cache obeys; model.config.sliding_window = "
            "None is full attention"
        )
    if getattr(layer.config, "use_bidirectional_attention", False):
        return "its attention is bidirectional (use_bidirectional_attention)"
    if plan.own_global and (path := placement.replaced(layer.attention, layer.qkv_paths)):
        return (
            f"the forward of {path} was replaced, which {plan.backend.name}'s second "
            "projections would not have"
        )
    if plan.latent is not None and not plan.backend.packable:
        return (
            f"its keys and values are latents, and what {plan.backend.name} remembers is "
            f"{plan.backend.traits.state}; latent heads go with exact patterns of one predicate, "
            "such as dense"
        )
    if (
        plan.latent is not None
        and plan.cache is not None
        and (reason := _latents_unheld(plan.cache, plan.latent))
    ):
        return reason
    if plan.cache is not None and (reason := caches.obstacle(layer, plan.backend, plan.cache)):
        return reason
    if (
        plan.cache is not None
        and plan.positions is not None
        and (reason := plan.cache.refuses_rule(plan.positions.rule.spec))
    ):
        return reason
    asked = None if plan.positions is None else plan.positions.in_call
    if asked is not None and not (plan.backend.traits.exact or plan.backend.places(asked)):
        return f"positions {asked.spec!r} need an exact pattern, which {plan.backend.name} is not"
    if asked is not None and "global_qkv" in plan.backend.extras:
        return (
            f"positions {asked.spec!r} and {plan.backend.name}'s second projections cannot be "
            "combined"
        )
    if plan.rotary is not None:
        rule = f"its rotary rule {plan.rotary.kind!r}"
        if plan.rotary.kind in LENGTH_DEPENDENT:
            return (
                f"{rule} depends on the sequence's length, {plan.pattern} counts positions by "
                "their place in the cache"
            )
        if plan.rotary.rope().dims != layer.rotary_dims:
            return (
                f"{rule} turns {plan.rotary.rope().dims} dimensions, expected {layer.rotary_dims}"
            )
    return None


def _cache_forgets(layer: anatomy.Layer) -> bool:
    """Whether transformers' own cache of this layer keeps a window of the tokens."""
    if getattr(layer.config, "sliding_window", None) is None:
        return False
    kinds = getattr(layer.config, "layer_types", None)
    return kinds is None or kinds[layer.index] == "sliding_attention"


def _latents_unheld(cache: caches.LayerCache, rank: int) -> str | None:
    """Why a cache cannot hold latents of `rank` numbers (0: not known yet); None where it can."""
    if reason := cache.refuses_latents():
        return reason
    try:
        cache.latent_coding(rank or TRIED_RANK)
    except ValueError as error:
        return f"its keys and values are latents of {rank}: {error}"
    return None


def _try_once(layer: anatomy.Layer, plan: LayerPlan, tried: list[tuple]) -> None:
    """`_try`, where nothing alike was tried before: a model has many layers, of few kinds. tried:
    those kinds, which this adds to."""
    device = placement.device_of(layer.k.module)
    # on the meta device nothing can be computed: the sizes are tried on the CPU
    device = torch.device("cpu") if device.type == "meta" else device
    if plan.positions is not None:
        plan.positions.rule.to(device)
    kind = (
        (device, layer.dtype, layer.heads, layer.kv_heads, layer.head_dim, layer.causal),
        (layer.softcap, layer.learned_sinks),
        (plan.pattern, plan.raw_keys, plan.latent, plan.cache),
        None if plan.positions is None else plan.positions.rule.spec,
        None if plan.rotary is None else (plan.rotary.kind, plan.rotary.rope().dims),
    )
    if kind not in tried:
        _try(layer, plan, device)
        # what a method learns is made in the trial, for each layer its own
        learned = [*plan.backend.parameters(), *plan.backend.buffers()]
        if plan.backend.traits.exact and not learned:
            tried.append(kind)
    plan.backend.train(layer.attention.training)


def _try(layer: anatomy.Layer, plan: LayerPlan, device: torch.device) -> None:
    """Runs the backend as this layer would. Parameters whose shape depends on the heads exist
    afterwards.
    """
    dtype = layer.dtype
    heads = (layer.heads, layer.kv_heads, layer.kv_heads)
    q, k, v = (torch.zeros(1, h, TRIED, layer.head_dim, dtype=dtype, device=device) for h in heads)
    extras: dict[str, Any] = {}
    if layer.softcap is not None:
        extras["softcap"] = layer.softcap
    if layer.learned_sinks:
        extras["sink_logits"] = torch.zeros(layer.heads, dtype=dtype, device=device)
    if plan.positions is not None:
        extras["rotary"] = plan.positions.in_call
    elif plan.rotary is not None:
        extras["rotary"] = plan.rotary.rope()
    backend = plan.backend.to(device).eval()
    state = None
    if layer.causal:
        state = state_of(backend, plan.cache, plan.latent is not None)
    if plan.latent is not None:  # of few numbers: the layer's own may be yet to be made
        rank = plan.latent or TRIED_RANK
        maps = (k.new_zeros(layer.kv_heads, layer.head_dim, rank) for _ in "kv")
        extras["latent"] = Latent(k.new_zeros(1, 1, TRIED, rank), Maps(*maps))
    try:
        with torch.no_grad():
            backend(q, k, v, causal=layer.causal, state=state, **extras)
    except ValueError as error:
        raise type(error)(f"layer {layer.index}: {error}") from error
