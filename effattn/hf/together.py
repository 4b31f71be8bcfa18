"""A model's cache whose layers change together: what one layer cannot do is refused before another
has done it.

transformers' `Cache` goes from layer to layer. A ring that refuses to go back would leave the
layers before it cropped, and the next call wrong without an error. `place` (in
`effattn.hf.cache`) gives the cache of a swapped model these operations; its class stays what
it was."""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from effattn.states.sizes import check_rows


def bind(cache: Cache) -> None:
    """From now on this cache checks lengths and rows in all layers before any of them changes."""
    # on the one object, so that other caches of its class stay as they are; once
    if "crop" in vars(cache) or torch.compiler.is_compiling():
        return
    for operation in (crop, reorder_cache, batch_select_indices, batch_repeat_interleave):
        setattr(cache, operation.__name__, MethodType(operation, cache))


def crop(self: Cache, tokens_to_remove: int) -> None:
    """Takes back the last tokens: 0 or a negative number. ValueError for what some layer cannot
    bring back.
    """
    if tokens_to_remove > 0:
        raise ValueError(
            f"crop: got {tokens_to_remove}, valid is 0 or minus the number of tokens to take back"
        )
    for index, layer in enumerate(self.layers):
        _check_crop(index, layer, -tokens_to_remove)
    type(self).crop(self, tokens_to_remove)


def reorder_cache(self: Cache, beam_idx: Tensor) -> None:
    """Row i becomes the old row beam_idx[i]. ValueError unless it names a row for each one there
    is.
    """
    _check_rows(self, beam_idx, whole=True)
    type(self).reorder_cache(self, beam_idx)


def batch_select_indices(self: Cache, indices: Tensor) -> None:
    """Keeps these rows; `indices`: numbers, or a bool mask over the rows. ValueError for rows that
    are not there.
    """
    _check_rows(self, indices)
    type(self).batch_select_indices(self, indices)


def batch_repeat_interleave(self: Cache, repeats: int) -> None:
    """Each row so many times. ValueError unless that is a whole number of at least 1."""
    if type(repeats) is not int or repeats < 1:
        raise ValueError(f"repeats: got {repeats!r}, valid is a whole number of at least 1")
    type(self).batch_repeat_interleave(self, repeats)


def _check_crop(index: int, layer: CacheLayerMixin, tokens: int) -> None:
    """Raises what taking back so many tokens would."""
    seen = int(layer.get_seq_length())
    if tokens > seen and layer.is_initialized:
        raise ValueError(
            f"crop: got {-tokens}, layer {index} has seen {seen} tokens; valid is {-seen} to 0"
        )
    if hasattr(layer, "check_crop"):
        layer.check_crop(-tokens)
    elif isinstance(layer, DynamicSlidingWindowLayer) and tokens and layer.is_initialized:
        _check_window(index, layer, tokens, seen)


def _check_window(index: int, layer: DynamicSlidingWindowLayer, tokens: int, seen: int) -> None:
    """transformers' own ring, which takes tokens back only while it records the past."""
    if seen >= layer.sliding_window and not getattr(layer, "record_past", False):
        raise ValueError(
            f"crop: got {-tokens}, but layer {index} has let go of what a window of "
            f"{layer.sliding_window} tokens ending there needs; valid is 0"
        )


def _check_rows(cache: Cache, index: Tensor, whole: bool = False) -> None:
    """ValueError unless `index` names rows of each layer's batch, `whole`: as many as there are."""
    for batch in {_batch(layer) for layer in cache.layers} - {None}:
        if index.dtype == torch.bool:
            if index.shape != (batch,):
                raise ValueError(
                    f"indices: expected a mask over {batch} rows, got {tuple(index.shape)}"
                )
            continue
        if whole and len(index) != batch:
            raise ValueError(f"beam_idx: expected {batch} rows, got {len(index)}")
        check_rows("indices", index, batch)


def _batch(layer: CacheLayerMixin) -> int | None:
    """How many rows a layer holds; None while it holds nothing."""
    if not layer.is_initialized:
        return None
    state = getattr(layer, "state", None)
    return state.batch if state is not None else layer.keys.shape[0]
