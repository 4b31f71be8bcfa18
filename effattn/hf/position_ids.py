"""Which position_ids a swapped model can honour.

Layers whose backend counts positions itself (sinks, position rules, keys that are kept before their
turn) count a row's real tokens: `attention_mask.cumsum(-1) - 1`, as `generate` does. The same
number may be added to all of a row, since such rules go by distance; it is written down in the
layer's state, and later calls have to add the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from effattn import padding
from effattn.errors import Unsupported
from effattn.hf import packed_rows
from effattn.hf.state_layer import StateLayer
from effattn.hf.swapped_layer import SwappedLayer


@dataclass
class Followed:
    """What is written down of a call for the one after it. tokens: so far; last (B or 1, 1): the
    position_ids of the last one, None where none were given; shift: as `State.shift`. grown:
    `generate` has put real tokens behind it since, and goes on with their position_ids."""

    tokens: int
    last: Tensor | None
    shift: tuple[int, ...] | None
    grown: bool = False


# What is known goes with the arguments of a call, so that one which fails leaves nothing behind,
# and those of which nothing is known are looked at:
# position_ids that have been: torch's count of writes to them, and what they add to rows' counts
_checked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# what goes on from a mask, or without one from a cache
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_caches: WeakKeyDictionary = WeakKeyDictionary()
NO_CACHE = Cache(layers=[])


def check_call(checkers: list[SwappedLayer], given: dict, rotary: bool) -> dict:
    """`check` for a whole model's call, before any of its layers has taken tokens in. given: its
    arguments by name; rotary: whether tokens without position_ids are numbered as they come.

    Returns arguments in place of those given, which carry on what is known of padding and positions
    by now: the host waits once, and not at all for what `generate` has made of an earlier call's.
    """
    ids, cache = given.get("position_ids"), given.get("past_key_values")
    cache = cache if isinstance(cache, Cache) else NO_CACHE
    tokens, mask = given.get("input_ids"), given.get("attention_mask")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or torch.compiler.is_compiling():
        return {}
    numbers, carried = packed_rows.of_call(given)
    if numbers is not None:
        return carried | {"position_ids": _mark(carried["position_ids"], None, numbers)}
    batch, new = tokens.shape[:2]
    held = [_held(cache, layer.index) for layer in checkers]
    totals = {new + (0 if one is None else int(one.get_seq_length())) for one in held}
    total = max(totals, default=new)
    fits = mask is None or (isinstance(mask, Tensor) and mask.shape == (batch, total))
    if len(totals) > 1 or not fits or not (ids is None or ids.ndim == 2):
        return {}  # which is an error of its own, or a mask that is refused by name
    before = _masks.pop(mask, None) if mask is not None else _caches.pop(cache, None)
    if mask is not None and padding.told(mask) is None:
        before = None  # somebody has written to it since
    seen = None if mask is None else padding.known(mask, total)
    cached = [one if isinstance(one, StateLayer) else None for one in held]
    shown = torch.arange(total - new, total, device=tokens.device)[None] if ids is None else ids
    if _follows(checkers, cached, before, total - new, ids):
        shift = before.shift
    elif mask is None and ids is None and _count_from_0(checkers, cached, batch):
        shift = (0,) * batch
    else:
        shift = None
        for layer, one in zip(checkers, cached, strict=True):
            padded = seen is not None and (layer.own_positions or not seen.whole)
            own = check(layer, one, batch, total, mask if padded else None, shown)
            shift = own if shift is None else shift
    carried = {"position_ids": _mark(shown, shift)} if rotary or ids is not None else {}
    # from the number of a token that is padding, nothing goes on
    known = total if seen is None or seen.ends < total else -1
    notes = Followed(known, None if ids is None else ids[:, -1:], shift)
    if mask is None and cache is not NO_CACHE:
        _caches[cache] = notes
    elif mask is not None:
        _masks[mask] = notes
        padding.tell(seen.real, seen, own=True)
        carried["attention_mask"] = seen.real
    return carried


def _held(cache, index: int):
    """The cache's layer, if it has it by now."""
    return cache.layers[index] if len(cache.layers) > index else None


def _count_from_0(checkers: list, cached: list, batch: int) -> bool:
    """Whether tokens without ids and padding fit, which is known without a look at the device."""
    return all(
        one is None or one.state.shift in (None, (0,) * batch)
        for layer, one in zip(checkers, cached, strict=True)
        if layer.own_positions
    )


def _follows(
    checkers: list, cached: list, before: Followed | None, past: int, ids: Tensor | None
) -> bool:
    """Whether a call's mask has grown from one whose call was checked, and its position_ids go on
    from there. Where the host would have to wait for that, the device stops if they do not."""
    if before is None or not before.grown or before.tokens != past:
        return False
    if (before.last is None) != (ids is None):
        return False
    for layer, one in zip(checkers, cached, strict=True):
        if layer.own_positions and one is not None and one.state.shift != before.shift:
            return False
    if ids is None:
        return True
    same = (ids == before.last + torch.arange(1, ids.shape[1] + 1, device=ids.device)).all()
    if same.device.type == "cpu":
        return bool(same)
    torch._assert_async(same, "position_ids: those of generate() do not go on from those before")
    return True


class Following:
    """What a swapped model has in place of transformers' method with which `generate` puts real
    tokens behind its mask: the same, and the new mask carries on what is known of the old one."""

    def __init__(self, model: Any):
        # a model that nobody needs is gone at once
        self.model: Callable[[], Any] = weakref.ref(model)

    def __reduce__(self):
        return Following, (self.model(),)

    def __call__(self, outputs, model_kwargs: dict, *args, **options) -> dict:
        update = GenerationMixin._update_model_kwargs_for_generation
        old = model_kwargs.get("attention_mask")
        model_kwargs = update(self.model(), outputs, model_kwargs, *args, **options)
        new, cache = (model_kwargs.get(name) for name in ("attention_mask", "past_key_values"))
        if old is None and new is None and isinstance(cache, Cache):
            if cache in _caches:
                _caches[cache].grown = True
        elif isinstance(old, Tensor) and isinstance(new, Tensor):
            before, seen = _masks.pop(old, None), padding.told(old, kept=True)
            if before is not None and seen is not None and seen.begun:
                padding.tell(new, seen.grown(new), own=True)
                _masks[new] = replace(before, grown=True)
        return model_kwargs


def _mark(ids: Tensor, shift: tuple[int, ...] | None, documents: Tensor | None = None) -> Tensor:
    """The same numbers, known as checked, and as those of `documents`."""
    ids = ids.view_as(ids)  # the caller's own may come again, with other padding
    packed_rows.tell(ids, documents)
    _checked[ids] = None if ids.is_inference() else ids._version, shift
    return ids


def was_checked(layer: SwappedLayer, cached: StateLayer | None, ids: Tensor | None) -> bool:
    """Whether position_ids are those of a call that `check_call` has looked at; if so, the layer's
    state is told what it found."""
    if not isinstance(ids, Tensor) or ids not in _checked:
        return False
    version, shift = _checked[ids]
    if not ids.is_inference() and ids._version != version:
        return False
    if layer.own_positions and cached is not None:
        cached.state.shift = shift
    return True


def check(
    layer: SwappedLayer,
    cached: StateLayer | None,
    batch: int,
    tokens: int,
    mask: Tensor | None,
    ids: Tensor | None,
) -> tuple[int, ...] | None:
    """Raises Unsupported for position_ids (1 or B, T) of the new tokens that `layer`, or those that
    it looks on behalf of, would ignore. mask: (B, tokens), all tokens so far; None: no padding.
    Returns what they add to the rows' own counts, of a layer that counts (`State.shift`)."""
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    new = ids.shape[1]
    if not (layer.own_positions or (mask is None and new > 1)):
        return None
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
        return None
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
    found = tuple(torch.where(seen, shift, torch.where(before, known, 0)).tolist())
    if state is not None:
        state.shift = found
    return found


VALID = "valid are attention_mask.cumsum(-1) - 1, or the same number more for all of a row"


def _refuse_jumps(layer: SwappedLayer, documents: bool) -> None:
    if documents:
        raise Unsupported(
            f"layer {layer.index}: packed documents: position_ids restart behind a cache, or leave "
            "out numbers; valid are ids that restart at each document, in a call without a cache "
            "(use_cache=False)"
        )
    raise Unsupported(
        f"layer {layer.index}: position_ids leave out numbers, and {layer.pattern} counts a row's "
        f"real tokens itself ({VALID})"
    )
