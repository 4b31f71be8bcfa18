"""Documents as one stream of tokens; long ones piece by piece: the same tokens as all at once, and
no more work than is asked for.

A tokenizer takes 180 bytes for every byte of text at once. Its pieces overlap here, and are joined
where both say the same for a stretch: what begins or ends a piece (a prefix space, half a word) is
in neither."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

PIECE = 1 << 19  # characters at once; documents that are no longer are not cut
OVERLAP = 2048  # characters that two pieces share; in the middle half of them they must agree


def encode(documents: Iterable[str], tokenizer, limit: int | None = None) -> torch.Tensor:
    """The documents' tokens end to end, each closed by one end-of-text token if there is one: int64
    (<= limit,). Documents without text give nothing. None: no limit."""
    end = tokenizer.eos_token_id
    pieces, total = [], 0
    for document in documents:
        if not document or document.isspace():
            continue
        ids = token_ids(document, tokenizer, None if limit is None else limit - total)
        ids = _without_ends(ids, end)
        if not ids:
            continue
        pieces.append(torch.tensor(ids if end is None else [*ids, end], dtype=torch.int64))
        total += len(pieces[-1])
        if limit is not None and total >= limit:
            break
    return torch.cat(pieces)[:limit] if pieces else torch.empty(0, dtype=torch.int64)


def _without_ends(ids: list[int], end: int | None) -> list[int]:
    """Without the end-of-text tokens that a text itself begins or ends with: one closes each
    document, not two.
    """
    first, last = 0, len(ids)
    while first < last and ids[first] == end:
        first += 1
    while first < last and ids[last - 1] == end:
        last -= 1
    return ids[first:last]


def token_ids(document: str, tokenizer, limit: int | None = None) -> list[int]:
    """The document's tokens without special ones; of a long document at least the first `limit`
    that are no end-of-text, if there are as many."""
    if len(document) <= PIECE or not getattr(tokenizer, "is_fast", False):
        return _whole(document, tokenizer)
    ids, counted = [], 0
    for piece in _pieces(document, tokenizer):
        if piece is None:
            return _whole(document, tokenizer)
        ids += piece
        counted += sum(one != tokenizer.eos_token_id for one in piece)
        if limit is not None and counted >= limit:
            break
    return ids


def _whole(document: str, tokenizer) -> list[int]:
    return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]


def _pieces(document: str, tokenizer) -> Iterator[list[int] | None]:
    """Token ids of one piece after the other; None where a piece does not agree with the one
    before.
    """
    step = PIECE - OVERLAP
    ids, begins = _encoded(document[:PIECE], tokenizer)
    given = 0  # how many of the piece's tokens the piece before has given
    for start in range(step, len(document) - OVERLAP, step):
        next_ids, next_begins = _encoded(document[start : start + PIECE], tokenizer)
        here = _between(begins, step + OVERLAP // 4, step + 3 * OVERLAP // 4)
        there = _between(next_begins, OVERLAP // 4, 3 * OVERLAP // 4)
        places = [[begin - step for begin in begins[here]], next_begins[there]]
        if not ids[here] or ids[here] != next_ids[there] or places[0] != places[1]:
            yield None
            return
        yield ids[given : here.start]
        ids, begins, given = next_ids, next_begins, there.start
    yield ids[given:]


def _encoded(text: str, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids, and the character at which each begins."""
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return found["input_ids"], [begin for begin, _ in found["offset_mapping"]]


def _between(begins: list[int], first: int, last: int) -> slice:
    """The tokens that begin at characters from `first` up to `last`."""
    inside = [number for number, begin in enumerate(begins) if first <= begin < last]
    return slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)
