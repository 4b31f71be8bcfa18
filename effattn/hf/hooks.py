"""What runs before a swapped model's attention modules: their cache, positions and second projections are seen to here.

transformers' attention functions get no cache and only rotated keys, so `effattn.swap` registers `before_attention` on
every swapped attention module and `before_model` on the model. Both are plain functions without state of their own:
copies and pickles of a model keep them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from effattn.hf import position_ids, state_layer

ATTRIBUTE = "_effattn"  # where a swap is kept: a plain attribute, in no state_dict, copied by deepcopy
HANDLE = "_effattn_hook"  # where the handle of the hook is kept
PATTERN = "effattn_pattern"  # the submodule that holds a backend's parameters and buffers
POSITIONS = "effattn_positions"  # the submodule that holds what a position rule learns
GLOBAL = "effattn_global"  # the submodule with the second projections, and the argument that carries their q, k, v
CAPTURE = "effattn_capture"  # the argument that tells our attention function to hand out q, k and v, and stop there


class GlobalProjections(nn.Module):
    """Second query, key and value projections of one attention module (Longformer's global ones), equal at first.

    Parameters are named as in the attention module, with "_" for ".": `q_proj_weight`. Fused projections stay fused.
    """

    def __init__(self, attention: nn.Module, paths: list[str]):
        super().__init__()
        self.names: dict[str, str] = {}
        for path in paths:
            for name, parameter in attention.get_submodule(path).named_parameters():
                full = f"{path}.{name}"
                self.names[full] = full.replace(".", "_")
                twin = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                self.register_parameter(self.names[full], twin)
        self._bare = (_Bare(attention),)  # in a tuple: the attention module is not a part of this one

    def forward(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v that the attention module makes with these weights from its own arguments: by its own code, so
        that norms, rotations and fused projections are right."""
        captured: list[tuple[Tensor, Tensor, Tensor]] = []
        kwargs = {**kwargs, CAPTURE: captured} | {name: None for name in _cache_names(kwargs)}
        weights = {f"inner.{full}": getattr(self, name) for full, name in self.names.items()}
        torch.func.functional_call(self._bare[0], weights, args, kwargs)
        return captured[0]


class _Bare(nn.Module):
    """An attention module without its hooks, which must not run twice."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)


def _cache_names(kwargs: dict) -> list[str]:
    return [name for name in ("past_key_values", "layer_past") if name in kwargs]


def before_attention(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a swapped attention module."""
    layer = getattr(module, ATTRIBUTE)
    for name in _cache_names(kwargs):
        if kwargs[name] is not None:
            state_layer.place(kwargs[name], layer)
    changed = {}
    if layer.positions is not None and layer.positions.own is not None:
        given, position_ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        changed["position_embeddings"] = layer.positions.embeddings(given, position_ids)
    elif layer.rotary is not None:  # the backend rotates: q and k pass as they are
        cos, _ = kwargs["position_embeddings"]
        changed["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(cos))
    if GLOBAL in module._modules:
        changed[GLOBAL] = module._modules[GLOBAL](args, {**kwargs, **changed})
    return (args, {**kwargs, **changed}) if changed else None


def before_model(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a swapped model: refuses position_ids that its layers cannot honour, before any of them has
    changed, and writes down on the cache how many tokens may be taken back after the call.

    Assisted decoding asks for the logits of its candidates and of one token more, plain decoding for one.
    """
    position_ids.check_call(getattr(module, ATTRIBUTE).checkers, args, kwargs)
    cache, kept = kwargs.get("past_key_values"), kwargs.get("logits_to_keep")
    candidates = kept - 1 if isinstance(kept, int) and kept > 1 else 0
    if isinstance(cache, Cache) and candidates != getattr(cache, state_layer.CANDIDATES, 0):
        setattr(cache, state_layer.CANDIDATES, candidates)
