"""Inside a live model: the attention and mask functions that transformers calls after a swap."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.hf.families import sliding_window
from effattn.interface import Backend

NAME = "effattn"  # the attention implementation, in transformers' two tables
ATTRIBUTE = "_effattn"  # where a swap is kept: a plain attribute, in no state_dict, copied by deepcopy


@dataclass
class LayerSwap:
    """One layer of a swapped model. `backend` None: it keeps what it had, the implementation `original`."""

    index: int
    backend: Backend | None
    original: str
    checks_positions: bool  # one layer looks for packed documents on behalf of all


def register() -> None:
    """Makes both functions known to transformers. Called by the first swap: importing effattn patches nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = True,
    **kwargs,
) -> Tensor | None:
    """The padding mask (B, all tokens so far) bool, unsliced; None when nothing is padded.

    Sizes come from one layer's cache, and a ring may sit beside full layers, so that slicing is each layer's own.
    """
    if q_length > 1 and not (allow_is_causal_skip and allow_is_bidirectional_skip):
        raise Unsupported(
            "packed documents (position_ids that restart) or an extra mask function: after a swap, documents would see "
            "each other; give one document a row, padded with attention_mask, or effattn.restore(model)"
        )
    seen = int(q_offset) + q_length
    if kv_length + kv_offset > seen and not (attention_mask is not None and attention_mask.shape[-1] > seen):
        raise Unsupported(
            f"static cache: it holds {kv_length} keys for {seen} tokens; after a swap, use the default cache "
            "(effattn.new_cache(model))"
        )
    if attention_mask is not None and attention_mask.shape[-1] != seen:
        raise ValueError(
            f"attention_mask: expected (batch, {seen}), the tokens in the cache and the {q_length} new ones, "
            f"got {tuple(attention_mask.shape)}"
        )
    if attention_mask is None or (not torch.compiler.is_compiling() and attention_mask.all()):
        return None
    return attention_mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, Hq, Tq, D), key and value with the past, rotated -> (B, Tq, Hq, Dv).

    attention_mask is what `mask` returned.
    """
    layer: LayerSwap | None = getattr(module, ATTRIBUTE, None)
    if layer is None:
        raise Unsupported(f"attn_implementation={NAME!r} is set by effattn.swap(model, ...), not by hand")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise Unsupported(
            f"layer {layer.index}: expected attention_mask (batch, tokens), got {tuple(attention_mask.shape)}; "
            "custom masks cannot be combined with a swap"
        )
    if layer.backend is None:
        return _keep(module, query, key, value, attention_mask, scaling, dropout, layer.original, kwargs)
    _refuse(layer, query, key, attention_mask, dropout, kwargs)
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True) and getattr(module.config, "is_causal", True)
    if torch.is_autocast_enabled(query.device.type):  # as torch does for its own attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = layer.backend(query, key, value, causal=causal, padding_mask=attention_mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _refuse(layer: LayerSwap, query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, kwargs: dict) -> None:
    """What the model asks of its attention and a backend does not do is an error, never ignored."""
    where = f"layer {layer.index}: "
    for name in ("softcap", "s_aux", "position_bias", "cache", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            raise Unsupported(f"{where}the model passes {name}, which backend {layer.backend.name!r} does not support")
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] > window:
        raise Unsupported(f"{where}the model's window is {window}, dense over {key.shape[2]} keys is not the same")
    if dropout:
        raise Unsupported(f"{where}attention dropout {dropout} while training; set config.attention_dropout to 0")
    if kwargs.get("output_attentions"):
        raise Unsupported(f"{where}output_attentions=True: no weights exist; effattn.restore(model), then use 'eager'")
    positions = kwargs.get("position_ids")
    unpadded = layer.checks_positions and mask is None and query.shape[2] > 1
    if unpadded and positions is not None and positions.ndim == 2 and (positions.diff(dim=-1) != 1).any():
        raise Unsupported(
            f"{where}packed documents: position_ids restart, and nothing else tells the documents apart; give one "
            "document a row, padded with attention_mask"
        )


def _keep(module, query, key, value, padding_mask, scaling, dropout, original: str, kwargs: dict):
    """What an unswapped layer had: its own implementation, with the mask that it would have been given."""
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        causal_mask_function,
        sliding_window_causal_mask_function,
    )
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    queries, keys = query.shape[2], key.shape[2]
    seen = keys if padding_mask is None else padding_mask.shape[1]
    window = sliding_window(module, module.config)
    own_mask = ALL_MASK_ATTENTION_FUNCTIONS[original](
        batch_size=query.shape[0],
        q_length=queries,
        kv_length=keys,
        q_offset=seen - queries,
        kv_offset=seen - keys,
        mask_function=causal_mask_function if window is None else sliding_window_causal_mask_function(window),
        attention_mask=padding_mask,
        local_size=window,
        dtype=query.dtype,
        device=query.device,
        config=module.config,
    )
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    run = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
    return run(module, query, key, value, own_mask, scaling=scaling, dropout=dropout, **kwargs)
