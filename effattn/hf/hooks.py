"""What runs before a swapped model's attention modules: their cache, positions and second
projections are seen to here.

transformers' attention functions get no cache and only rotated keys, so `effattn.swap` registers
`before_attention` on every swapped attention module and `before_model` on the model. Both are plain
functions without state of their own: copies and pickles of a model keep them."""

from __future__ import annotations

import inspect
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from effattn.errors import Unsupported
from effattn.hf import packed_rows, placement, position_ids, presses
from effattn.hf.cache import CANDIDATES, place
from effattn.hf.names import (
    ATTRIBUTE,
    CAPTURE,
    GLOBAL,
    HANDLE,
    LATENT,
    LEARNED_PARTS,
    NAME,
    PATTERN,
    POSITIONS,
)
from effattn.hf.weights import is_packed

__all__ = [
    "ATTRIBUTE",
    "CAPTURE",
    "GLOBAL",
    "HANDLE",
    "LATENT",
    "LEARNED_PARTS",
    "NAME",
    "PATTERN",
    "POSITIONS",
    "GlobalProjections",
    "before_attention",
    "before_body",
    "before_model",
    "refuse_continuous_batching",
]


class GlobalProjections(nn.Module):
    """Second query, key and value projections of one attention module (Longformer's global ones),
    equal at first.

    Parameters are named as in the attention module, with "_" for ".": `q_proj_weight`. Fused
    projections stay fused. Projections that are more than their own floating-point parameters
    (packed weights, adapters) are copied whole."""

    def __init__(self, attention: nn.Module, paths: list[str]):
        super().__init__()
        # in a tuple: it is not a part of this module, and no argument of a hook
        self._attention = (attention,)
        # path -> {parameter: its name here}, or {} where the whole is here
        self.names: dict[str, dict[str, str]] = {}
        for path in paths:
            here = path.replace(".", "_")
            twin = placement.duplicate(attention.get_submodule(path))
            if _is_its_parameters(twin):
                self.names[path] = {
                    name: f"{here}_{name}" for name in dict(twin.named_parameters())
                }
                for name, full in self.names[path].items():
                    self.register_parameter(full, getattr(twin, name))
            else:
                self.names[path] = {}
                self.add_module(here, twin)

    def forward(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v that the attention module makes with these weights from its own arguments: by
        its own code, so that norms, rotations and fused projections are right."""
        # A shallow twin of the attention module, with these projections in the places of its own,
        # is run until it calls our attention function, which hands out q, k and v instead of
        # attending. The module itself is not touched.
        args, kwargs = placement.taken(self._attention[0], args, kwargs)
        twin = placement.bare(self._attention[0])
        for path, names in self.names.items():
            *parents, leaf = path.split(".")
            inside = twin
            for name in parents:
                child = placement.bare(inside._modules[name])
                inside._modules[name] = child
                inside = child
            if names:
                projection = placement.bare(_own(inside._modules[leaf]))
                projection._parameters.update(
                    {name: getattr(self, full) for name, full in names.items()}
                )
            else:
                projection = self._modules[path.replace(".", "_")]
            inside._modules[leaf] = projection
        captured: list[tuple[Tensor, Tensor, Tensor]] = []
        kwargs = {**kwargs, CAPTURE: captured} | {name: None for name in _cache_names(kwargs)}
        twin.forward(*args, **kwargs)
        return captured[0]


def _is_its_parameters(module: nn.Module) -> bool:
    """Whether a projection computes the same as another of its class with the same parameters."""
    own = list(module.parameters(recurse=False))
    return (
        bool(own)
        and not is_packed(module)
        and not module._modules
        and all(p.is_floating_point() for p in own)
    )


def _own(module: nn.Module) -> nn.Module:
    """The model's own module, without the adapters that peft has put around it: they are for the
    local projections.
    """
    while isinstance(module._modules.get("base_layer"), nn.Module):
        module = module._modules["base_layer"]
    return module


def _cache_names(kwargs: dict) -> list[str]:
    return [name for name in ("past_key_values", "layer_past") if name in kwargs]


def before_attention(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a swapped attention module."""
    layer = getattr(module, ATTRIBUTE)
    given = module.config._attn_implementation
    # another function would get q and k without their rotation, or leave the pattern out
    if given != NAME:
        raise Unsupported(
            f"layer {layer.index}: the attention implementation was set to {given!r}, which "
            f"cannot compute the swapped {layer.pattern}; effattn.restore(model) first, or keep "
            f"the swap: model.set_attn_implementation({NAME!r})"
        )
    changed = {}
    for name in _cache_names(kwargs):
        if kwargs[name] is not None:
            place(kwargs[name], layer)
            if layer.cache is not None and layer.cache.asks:
                state = kwargs[name].layers[layer.index].state
                presses.ask(state, module, args, kwargs, layer.cache.rotary)
            if layer.latent is not None:
                given_states = args[0] if args else kwargs["hidden_states"]
                changed[LATENT] = module._modules[LATENT](given_states)
    if layer.positions is not None and layer.positions.own is not None:
        given, position_ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        changed["position_embeddings"] = layer.positions.embeddings(given, position_ids)
    elif layer.rotary is not None:  # the backend rotates: q and k pass as they are
        cos, _ = kwargs["position_embeddings"]
        changed["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(cos))
    if GLOBAL in module._modules:
        changed[GLOBAL] = module._modules[GLOBAL](args, {**kwargs, **changed})
    return (args, {**kwargs, **changed}) if changed else None


def before_model(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a swapped model: refuses position_ids that its layers cannot honour,
    before any of them has changed, and writes down on the cache how many tokens may be taken back
    after the call. Padding and positions go on with what is known of them (`position_ids`).

    Assisted decoding asks for the logits of its candidates and of one token more, plain decoding
    for one."""
    swap = getattr(module, ATTRIBUTE)
    given = _by_name(module, args, kwargs)
    carried = position_ids.check_call(swap.checkers, given, swap.rotary)
    # of the last tokens all but one are candidates: it is their logits that decide about them
    cache, kept = given.get("past_key_values"), given.get("logits_to_keep")
    candidates = kept - 1 if isinstance(kept, int) and kept > 1 else 0
    if isinstance(cache, Cache) and candidates != getattr(cache, CANDIDATES, 0):
        setattr(cache, CANDIDATES, candidates)
    return ((), given | carried) if carried else None


def before_body(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a swapped model without its head, for those that call it past
    `before_model` (adapters do): packed documents are found, and transformers leaves them to us."""
    given = _by_name(module, args, kwargs)
    if torch.compiler.is_compiling() or packed_rows.is_told(given.get("position_ids")):
        return None
    numbers, carried = packed_rows.of_call(given)
    if numbers is None:
        return None
    ids = carried["position_ids"].clone()  # the caller's own may come again, with other padding
    packed_rows.tell(ids, numbers)
    return (), given | carried | {"position_ids": ids}


def _by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call by name; in a graph only those that were given so."""
    if not args or torch.compiler.is_compiling():
        return kwargs
    return dict(zip(_names(type(module)), args)) | kwargs  # noqa: B905


@lru_cache
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    """What a class' forward calls its positional arguments."""
    parameters = inspect.signature(kind.forward).parameters.values()
    return tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)[1:]


def refuse_continuous_batching(*args, **kwargs) -> None:
    """Stands on a swapped model in place of its `init_continuous_batching`, which `generate_batch`
    calls as well.
    """
    raise Unsupported(
        "continuous batching (generate_batch): it has a paged cache of its own, which swapped "
        "attention cannot read; effattn.restore(model) first, or model.generate(...) on a padded "
        "batch"
    )
