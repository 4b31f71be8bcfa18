"""Documents packed into the rows of a live model's batch: found where transformers' collators and
Trainer write them, in position_ids that restart, or in cu_seq_lens_q.

`find` turns them into the numbers that `effattn.documents` takes. They go with the position_ids of
a call, as whatever is known of those: every layer asks with `of_layer`, and the device is asked
once.

B: rows; T: tokens."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

from effattn.errors import Unsupported

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k")  # where a call may say where its documents are

# position_ids -> torch's count of writes to them, a weak reference to the mask that they were read
# with (None: to none; True: `tell` was asked for, and they go with any), and the numbers
_told: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def tell(ids: Tensor, numbers: Tensor | None) -> None:
    """From now on these position_ids, which nobody else has, are of documents with these numbers
    (None: a row is one document)."""
    _told[ids] = _version(ids), True, numbers


def is_told(ids: Any) -> bool:
    """Whether `tell` was called on position_ids, which have not changed since."""
    found = _told.get(ids) if isinstance(ids, Tensor) else None
    return found is not None and found[1] is True and found[0] == _version(ids)


def of_layer(kwargs: dict, mask: Tensor | None, rows: int, tokens: int) -> Tensor | None:
    """The numbers of the documents that an attention module's call is about, None where a row is
    one. kwargs: what transformers passes to attention; mask (B, tokens) bool; rows, tokens: of the
    queries."""
    if tokens == 1 or is_tracing():  # first: every layer of every step of decoding comes by here
        return None
    ids, borders = kwargs.get("position_ids"), _borders(kwargs)
    known = isinstance(ids, Tensor) and ids.ndim == 2
    if not known and borders is None:
        return None
    if mask is not None and mask.shape[1] != tokens:  # goes on from a cache
        return None
    if not known:
        return find(None, mask, borders, rows, tokens)
    version, seen, numbers = _told.get(ids, (None, None, None))
    fits = seen is True or (mask is None if seen is None else mask is not None and seen() is mask)
    if ids not in _told or version != _version(ids) or not fits:
        numbers = find(ids, mask, borders, rows, tokens)
        _told[ids] = _version(ids), None if mask is None else weakref.ref(mask), numbers
    return numbers


def of_call(given: dict) -> tuple[Tensor | None, dict]:
    """The numbers of a whole model's call, and the arguments that take the place of those given so
    that transformers neither makes a mask of its own for documents nor a cache.

    given: the call's arguments by name. Raises Unsupported for documents with a cache."""
    ids, mask, cache = (
        given.get(name) for name in ("position_ids", "attention_mask", "past_key_values")
    )
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    past = isinstance(cache, Cache) and bool(cache.get_seq_length())
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or tokens.shape[1] == 1 or past:
        return None, {}
    if not (mask is None or (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2])):
        return None, {}
    if ids is not None and not (isinstance(ids, Tensor) and ids.ndim == 2):
        return None, {}
    numbers = find(ids, mask, _borders(given), *tokens.shape[:2])
    if numbers is None:
        return None, {}
    if cache is not None or given.get("use_cache"):
        raise Unsupported(
            "packed documents: a cache holds one document a row; valid is use_cache=False, and no "
            "past_key_values"
        )
    if mask is None:  # with one, transformers leaves documents to us
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    ids = _positions(numbers) if ids is None else ids
    return numbers, {"attention_mask": mask, "position_ids": ids, "use_cache": False}


def _positions(numbers: Tensor) -> Tensor:
    """Position_ids (B, T) of documents' numbers: each counts its own tokens, 0 for padding."""
    flat, places = numbers.flatten(), torch.zeros_like(numbers).flatten()
    at = (flat >= 0).nonzero()[:, 0]
    _, lengths = flat[at].unique_consecutive(return_counts=True)
    first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    places[at] = torch.arange(len(at), device=at.device) - first
    return places.view_as(numbers)


def find(
    ids: Tensor | None, mask: Tensor | None, borders: Tensor | None, rows: int, tokens: int
) -> Tensor | None:
    """(B, T) int64, which document of its row each token is of, -1 for padding; None where every
    row is one document.

    ids (1 or B, T): position_ids, which restart where a document begins; mask (B, T): not 0 for
    real tokens; borders (documents + 1,): instead, the numbers of their first tokens in a batch of
    one row, and T. Unsupported for position_ids that leave out numbers inside of documents,
    ValueError for borders that are not of this batch."""
    if borders is None and (ids is None or not _restarts(ids, mask)):
        return None
    real = torch.ones(rows, tokens, dtype=torch.bool) if mask is None else mask.bool().cpu()
    at = real.flatten().nonzero()[:, 0]
    row = at // tokens
    places = None if ids is None else ids.expand(rows, -1).cpu().flatten()[at]
    begins = torch.ones_like(at, dtype=torch.bool)
    begins[1:] = row[1:] != row[:-1]
    if borders is None:
        begins[1:] |= places.diff() < 1
    else:
        own = torch.bucketize(at, _checked(borders, rows, tokens), right=True)
        begins[1:] |= own.diff() != 0
    if places is not None and (~begins[1:] & (places.diff() != 1)).any():
        raise Unsupported(
            "position_ids leave out numbers inside of packed documents; valid are consecutive ones "
            "from each document's first token on"
        )
    numbers = torch.full((rows * tokens,), -1)
    numbers[at] = begins.cumsum(0) - 1
    numbers = numbers.view(rows, tokens)
    return numbers.to((ids if borders is None else borders).device)


def _restarts(ids: Tensor, mask: Tensor | None) -> bool:
    """Whether position_ids go back between two real tokens of a row with none between them."""
    back = ids.diff(dim=1) < 1
    if mask is not None and back.shape[1]:
        real = mask.bool()
        back = back & real[:, 1:] & real[:, :-1]
    return bool(back.any())


def _borders(given: dict) -> Tensor | None:
    """Where a call says that its documents begin; ValueError where it says two things."""
    found = [given[name] for name in BORDERS if given.get(name) is not None]
    if not found:
        return None
    if len(found) == 2 and not torch.equal(*found):
        raise ValueError(
            f"{BORDERS[0]}: got other borders than {BORDERS[1]}; valid are the same, as keys and "
            "queries are the same tokens"
        )
    return found[0]


def _checked(borders: Tensor, rows: int, tokens: int) -> Tensor:
    """Borders of a batch of one row, on the host. ValueError for others."""
    found = borders.detach().cpu().long()
    whole = found.ndim == 1 and len(found) > 1 and int(found[0]) == 0 and int(found[-1]) == tokens
    if rows != 1 or not whole or (found.diff() < 0).any():
        raise ValueError(
            f"{BORDERS[0]}: got {found.tolist()} for ({rows}, {tokens}) tokens, valid are numbers "
            f"from 0 up to {tokens}, of a batch of one row"
        )
    return found


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
