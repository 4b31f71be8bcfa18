"""Which position_ids a swapped model can honour.

Layers whose backend counts positions itself (sinks, position rules, keys that are kept before their
turn) count a row's real tokens: `attention_mask.cumsum(-1) - 1`, as `generate` does. The same
number may be added to all of a row, since such rules go by distance; it is written down in the
layer's state, and later calls have to add the same."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from effattn.errors import Unsupported
from effattn.hf.state_layer import StateLayer
from effattn.hf.swapped_layer import SwappedLayer


def check_call(checkers: list[SwappedLayer], args: tuple, kwargs: dict) -> None:
    """`check` for a whole model's call, before any of its layers has taken tokens in."""
    given = kwargs.get("input_ids", args[0] if args else None)
    given = kwargs.get("inputs_embeds") if given is None else given
    if not isinstance(given, Tensor) or given.ndim < 2 or torch.compiler.is_compiling():
        return
    batch, new = given.shape[:2]
    mask, ids, cache = (
        kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values")
    )
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return
    for layer in checkers:
        held = (
            cache.layers[layer.index]
            if isinstance(cache, Cache) and len(cache.layers) > layer.index
            else None
        )
        total = new + (0 if held is None else int(held.get_seq_length()))
        if mask is not None and mask.shape != (batch, total):
            return  # which is an error of its own
        cached = held if isinstance(held, StateLayer) else None
        layer.default_positions = mask is None and ids is None and _goes_on(layer, cached, batch)
        if layer.default_positions:
            continue
        by_default = torch.arange(total - new, total, device=given.device)[None]
        check(layer, cached, batch, total, mask, by_default if ids is None else ids)


def _goes_on(layer: SwappedLayer, cached: StateLayer | None, batch: int) -> bool:
    """Whether tokens without ids and padding fit, which is known without a look at the device."""
    state = None if cached is None else cached.state
    if not layer.own_positions or state is None:
        return True
    if state.shift not in (None, (0,) * batch):
        return False
    state.shift = (0,) * batch
    return True


def check(
    layer: SwappedLayer,
    cached: StateLayer | None,
    batch: int,
    tokens: int,
    mask: Tensor | None,
    ids: Tensor | None,
) -> None:
    """Raises Unsupported for position_ids (1 or B, T) of the new tokens that `layer`, or those that
    it looks on behalf of, would ignore. mask: (B, tokens), all tokens so far; None: no padding."""
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return
    new = ids.shape[1]
    if not (layer.own_positions or (mask is None and new > 1)):
        return
    if mask is None:
        mask = torch.ones(batch, tokens, dtype=torch.bool, device=ids.device)
        padded = False
    else:
        mask, padded = mask.bool(), True
    # How much is added to each real token's own count; it has to be one number a row, in this call
    # and the same as in those before. Padding may say anything.
    real, before = mask[:, -new:], mask[:, : mask.shape[1] - new].any(dim=1)
    added = ids - (mask.long().cumsum(dim=1) - 1)[:, -new:]
    # of each row that has a real token here
    shift = torch.where(real, added, added.min()).amax(dim=1)
    if ((added != shift[:, None]) & real).any():
        restarts = ((ids.diff(dim=1) < 1) & real[:, 1:] & real[:, :-1]).any()
        _refuse_jumps(layer, bool(restarts) or not padded)
    if not layer.own_positions:
        return
    state, seen = None if cached is None else cached.state, real.any(dim=1)
    if state is not None and state.shift is not None:
        known = torch.tensor(state.shift, device=ids.device)
    else:
        # a plain cache tells nothing: ids that count padding on the left too are what a model makes
        # by default
        default = mask.int().argmax(dim=1)
        known = torch.where(shift == default, default, 0)
    if (before & seen & (shift != known)).any():
        row = int((before & seen & (shift != known)).nonzero()[0])
        raise Unsupported(
            f"layer {layer.index}: position_ids: row {row} goes on at a number that is "
            f"{int(shift[row])} more than its real tokens, got {int(known[row])} more before; "
            f"{layer.pattern} counts them itself ({VALID})"
        )
    if state is not None:
        state.shift = tuple(torch.where(seen, shift, torch.where(before, known, 0)).tolist())


VALID = "valid are attention_mask.cumsum(-1) - 1, or the same number more for all of a row"


def _refuse_jumps(layer: SwappedLayer, documents: bool) -> None:
    if documents:
        raise Unsupported(
            f"layer {layer.index}: packed documents: position_ids restart, and nothing else tells "
            "the documents apart; give one document a row, padded with attention_mask"
        )
    raise Unsupported(
        f"layer {layer.index}: position_ids leave out numbers, and {layer.pattern} counts a row's "
        f"real tokens itself ({VALID})"
    )
