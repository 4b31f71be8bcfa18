"""Inside a live model: the attention and mask functions that transformers calls after a swap.

A call of a swapped model: `hooks.before_model` looks at position_ids, transformers asks `mask` once
for the padding, and in each layer `hooks.before_attention` sees to its cache and positions before
the layer's own code projects, rotates (or passes on) and calls `attention`, which gives all to the
layer's backend.

B: rows; Hq, Hkv: query and key/value heads; Tq, T: new tokens; D, Dv: of a key, of a value."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from effattn import padding
from effattn.errors import Unsupported
from effattn.hf import packed_rows, position_ids
from effattn.hf.families import sliding_window
from effattn.hf.names import ATTRIBUTE, CAPTURE, GLOBAL, LATENT, NAME
from effattn.hf.state_layer import Handle
from effattn.hf.swapped_layer import SwappedLayer
from effattn.padding import of_tokens
from effattn.patterns.exact import ExactBackend

PACKED = (
    "packed documents (position_ids that restart) in a graph, or an extra mask function: documents "
    "would see each other; call the model outside of a graph, or give one document a row, padded "
    "with attention_mask"
)
MOST_WEIGHTS = 2048  # tokens of which output_attentions makes the weights of every pair
# what a model passes: what a backend calls it
EXTRAS = {
    "softcap": "softcap",
    "s_aux": "sink_logits",
    "global_attention_mask": "global_mask",
    "prefix_lengths": "prefix",
}


@dataclass
class LayerSwap(SwappedLayer):
    """One layer of a swapped model, as its attention module carries it."""

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        register()  # a pickle may be read by a process that has never swapped a model


def register() -> None:
    """Makes both functions known to transformers. Called by swaps and by what is read of a swapped
    model: importing effattn patches nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    # kvpress wraps what it finds there when it is imported, and asks keys for their shape
    if ALL_ATTENTION_FUNCTIONS[NAME] is not attention:
        ALL_ATTENTION_FUNCTIONS[NAME] = attention


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = True,
    **kwargs,
) -> Tensor | None:
    """The padding mask (B, all tokens so far) bool, unsliced; None when nothing is padded.

    Sizes come from one layer's cache, and a ring may sit beside full layers, so that slicing is
    each layer's own."""
    from transformers.masking_utils import bidirectional_mask_function

    # transformers allows to skip its mask where a plain causal one would do; a bidirectional mask
    # function never allows that skip, and is plain all the same
    plain = allow_is_causal_skip or mask_function is bidirectional_mask_function
    if q_length > 1 and not (plain and allow_is_bidirectional_skip):
        if not is_tracing():
            raise Unsupported(PACKED)
        # a graph has a rule for packed documents whether there are any or not: it is asked when it
        # runs (a window of 1, where no token sees the one before it, tells nothing)
        if kwargs.get("local_size") != 1:
            _assert_one_document(mask_function, batch_size, q_length, kwargs.get("device"))
    # a static cache in a graph: lengths are numbers on the device, which are not asked for
    if isinstance(q_offset, Tensor) and torch.compiler.is_compiling():
        return attention_mask
    seen = (int(q_offset) if isinstance(q_offset, Tensor) else q_offset) + q_length
    if kv_length + kv_offset > seen and not (
        attention_mask is not None and attention_mask.shape[-1] > seen
    ):
        raise Unsupported(
            f"static cache: it holds {kv_length} keys for {seen} tokens; after a swap, use the "
            "default cache (effattn.new_cache(model))"
        )
    if attention_mask is not None and attention_mask.shape[-1] != seen:
        raise ValueError(
            f"attention_mask: expected (batch, {seen}), the tokens in the cache and the "
            f"{q_length} new ones, got {tuple(attention_mask.shape)}"
        )
    if attention_mask is None or torch.compiler.is_compiling():
        return attention_mask
    return None if padding.known(attention_mask, seen).whole else attention_mask


def _assert_one_document(mask_function, rows: int, tokens: int, device) -> None:
    """Fails when a compiled call is run on rows in which a token does not see the one before it."""
    row, place = (
        torch.arange(rows, device=device)[:, None],
        torch.arange(tokens, device=device)[None],
    )
    sees = mask_function(row, place.new_zeros(()), place[:, 1:], place[:, :-1])
    torch._assert_async(sees.all(), PACKED)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query (B, Hq, Tq, D) -> (B, Tq, Hq, Dv), and with
    `output_attentions` the weights (B, Hq, Tq, T). attention_mask is `mask`'s.

    key and value are handles of our own cache layers, or tensors with the past. They are rotated,
    unless the layer's backend does that itself."""
    if CAPTURE in kwargs:  # only the projections are wanted
        kwargs[CAPTURE].append((query, key, value))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    layer: LayerSwap | None = getattr(module, ATTRIBUTE, None)
    if layer is None:
        raise Unsupported(
            f"attn_implementation={NAME!r} is set by effattn.swap(model, ...), not by hand and "
            "not by the config of another model that was swapped; a swap that was saved is loaded "
            "by effattn.load(folder), and model.set_attn_implementation('sdpa') is plain attention"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise Unsupported(
            f"layer {layer.index}: expected attention_mask (batch, tokens), got "
            f"{tuple(attention_mask.shape)}; custom masks cannot be combined with a swap"
        )
    documents = packed_rows.of_layer(kwargs, attention_mask, query.shape[0], query.shape[2])
    if layer.backend is None:
        return _keep(
            module,
            query,
            key,
            value,
            (attention_mask, documents),
            scaling,
            dropout,
            layer.original,
            kwargs,
        )
    _refuse(module, layer, query, key, dropout, kwargs)
    cached = key.layer if isinstance(key, Handle) else None
    if cached is not None:
        key, value = cached.take(key)
    call = _asked(module, layer, kwargs) | {"scale": scaling}
    drops = {"dropout": dropout} if dropout else {}  # the model's own rate, while it trains
    if layer.checks_positions and is_tracing():
        _assert_consecutive(layer, query.shape[2], attention_mask, kwargs.get("position_ids"))
    elif documents is not None:
        if cached is not None:
            raise Unsupported(
                f"layer {layer.index}: packed documents: a cache holds one document a row; valid "
                "is use_cache=False"
            )
        call["documents"] = documents
    elif layer.checks_positions and not position_ids.was_checked(
        layer, cached, kwargs.get("position_ids")
    ):
        tokens = key.shape[2] + (0 if cached is None else int(cached.get_seq_length()))
        position_ids.check(
            layer, cached, query.shape[0], tokens, attention_mask, kwargs.get("position_ids")
        )
    precision = contextlib.nullcontext()
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        # cast as torch does for its own attention, which leaves fp64 as it is; inside, nothing is
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        call = of_tokens(call, *[lambda x: x.to(dtype)] * 2)
        precision = torch.autocast(query.device.type, enabled=False)
    with precision:
        if cached is not None:
            out = cached.attend(layer.backend, query, key, value, attention_mask, **call, **drops)
        else:
            # transformers' own cache of a windowed layer has the last tokens only
            if attention_mask is not None and attention_mask.shape[1] != key.shape[2]:
                attention_mask = attention_mask[:, -key.shape[2] :]
            out = layer.backend(query, key, value, padding_mask=attention_mask, **call, **drops)
        weights = None
        if kwargs.get("output_attentions"):
            weights = layer.backend.weights(query, key, padding_mask=attention_mask, **call)
    return out.transpose(1, 2).contiguous(), weights


def _asked(module: nn.Module, layer: LayerSwap, kwargs: dict) -> dict:
    """What the model and the swap ask of a backend's call, by the backend's names."""
    call = {name: kwargs[given] for given, name in EXTRAS.items() if kwargs.get(given) is not None}
    if "global_mask" in call:  # transformers' Longformer has it as 0 and 1
        call["global_mask"] = call["global_mask"].bool()
    if GLOBAL in kwargs:
        call["global_qkv"] = kwargs[GLOBAL]
    if LATENT in kwargs:
        call["latent"] = kwargs[LATENT]
    if layer.positions is not None and layer.positions.in_call is not None:
        call["rotary"] = layer.positions.in_call
    elif layer.rotary is not None:
        call["rotary"] = layer.rotary.rope()
    return call | {"causal": is_causal(module, kwargs)}


def is_causal(module: nn.Module, kwargs: dict) -> bool:
    """Whether this call of an attention module is causal."""
    causal = kwargs.get("is_causal")
    if causal is not None:
        return causal
    return getattr(module, "is_causal", True) and getattr(module.config, "is_causal", True)


def _refuse(
    module: nn.Module,
    layer: LayerSwap,
    query: Tensor,
    key: Tensor | Handle,
    dropout: float,
    kwargs: dict,
) -> None:
    """What the model asks of its attention and a backend does not do is an error, never ignored."""
    where = f"layer {layer.index}: "
    missing = [name for name, extra in EXTRAS.items() if extra not in layer.backend.extras]
    for name in (*missing, "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise Unsupported(
                f"{where}the model passes {name}, which backend {layer.backend.name!r} does not "
                "support"
            )
    if dropout and "dropout" not in layer.backend.extras:
        raise Unsupported(
            f"{where}attention dropout {dropout} while training; {_dropout(module, dropout)} = "
            f"0.0 on every {type(module).__name__} of the model turns it off (the config is read "
            f"only when a model is built); {layer.backend.name} has no weights of pairs to drop, "
            "exact patterns have"
        )
    if kwargs.get("output_attentions"):
        _refuse_weights(layer, query, key)


def _refuse_weights(layer: LayerSwap, query: Tensor, key: Tensor | Handle) -> None:
    """Weights are made for exact patterns, of whole sequences, short ones."""
    where, valid = f"layer {layer.index}: output_attentions=True: ", "valid is "
    past = key.layer.get_seq_length() if isinstance(key, Handle) else key.shape[2] - query.shape[2]
    if not isinstance(layer.backend, ExactBackend):
        raise Unsupported(f"{where}{layer.pattern} has no softmax weights; {valid}an exact pattern")
    if past:
        raise Unsupported(
            f"{where}the cache holds {int(past)} tokens already; {valid}a call on the whole "
            "sequence"
        )
    if query.shape[2] > MOST_WEIGHTS:
        raise Unsupported(
            f"{where}got {query.shape[2]} tokens; {valid}at most {MOST_WEIGHTS}, as weights are a "
            "number for each pair"
        )


def _assert_consecutive(
    layer: LayerSwap, new: int, mask: Tensor | None, positions: Tensor | None
) -> None:
    """For a graph, in which nothing can be asked: position_ids that restart fail when it runs."""
    if positions is None or positions.ndim != 2 or new == 1 or not (mask is None or layer.raw_keys):
        return
    jumps = positions.diff(dim=-1) != 1
    if mask is not None:
        real = mask[:, -new:]
        jumps = jumps & real[:, 1:] & real[:, :-1]
    torch._assert_async(~jumps.any(), f"layer {layer.index}: {PACKED}")


def _dropout(module: nn.Module, rate: float) -> str:
    """Where an attention module keeps the rate of its dropout: each class has a name of its own for
    it.
    """
    own = [name for name, value in vars(module).items() if "dropout" in name and value == rate]
    inner = [
        f"{name}.p" for name, part in module.named_children() if getattr(part, "p", None) == rate
    ]
    return (own + inner + ["attention_dropout"])[0]


def _keep(module, query, key, value, masks, scaling, dropout, original: str, kwargs: dict):
    """What an unswapped layer had: its own implementation, with the mask that it would have been
    given. masks: of padding, and the numbers of documents.
    """
    padding_mask, documents = masks
    if kwargs.get("prefix_lengths") is not None:
        index = getattr(module, ATTRIBUTE).index
        raise Unsupported(f"layer {index}: prefix_lengths: valid in layers of 'dense'")
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    queries, keys = query.shape[2], key.shape[2]
    seen = keys if padding_mask is None else padding_mask.shape[1]
    window = sliding_window(module, module.config)
    causal = is_causal(module, kwargs)
    if not causal:
        rule = masking_utils.bidirectional_mask_function
    elif window is None:
        rule = masking_utils.causal_mask_function
    else:
        rule = masking_utils.sliding_window_causal_mask_function(window)
    if documents is not None:
        apart = masking_utils.packed_sequence_mask_function(documents)
        rule = masking_utils.and_masks(apart, rule)
    own_mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[original](
        batch_size=query.shape[0],
        q_length=queries,
        kv_length=keys,
        q_offset=seen - queries,
        kv_offset=seen - keys,
        mask_function=rule,
        attention_mask=padding_mask,
        # a look at the mask, which would make a GPU wait
        allow_is_causal_skip=causal
        and documents is None
        and (padding_mask is None or query.device.type == "cpu"),
        local_size=window,
        dtype=query.dtype,
        device=query.device,
        config=module.config,
    )
    # "eager" is in no table: each model's file has its own
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    run = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
    return run(module, query, key, value, own_mask, scaling=scaling, dropout=dropout, **kwargs)
