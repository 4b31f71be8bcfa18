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
TRIES = 4  # places where two pieces may be joined, before the whole document is taken at once
CHARACTERS = 6  # of a token, about and rather too many: a piece that holds what is asked for


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
    size = PIECE if limit is None else min(PIECE, max(8 * OVERLAP, CHARACTERS * limit))
    if len(document) <= size or not getattr(tokenizer, "is_fast", False):
        return _whole(document, tokenizer)
    ids, counted = [], 0
    for piece in _pieces(document, tokenizer, size):
        if piece is None:
            return _whole(document, tokenizer)
        ids += piece
        counted += sum(one != tokenizer.eos_token_id for one in piece)
        if limit is not None and counted >= limit:
            break
    return ids


def _whole(document: str, tokenizer) -> list[int]:
    return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]


def _pieces(document: str, tokenizer, size: int | None = None) -> Iterator[list[int] | None]:
    """Token ids of one piece of `size` characters (default: `PIECE`) after the other; None where a
    piece agrees with the one before at none of `TRIES` places: in a long run of blanks, say.
    """
    size = PIECE if size is None else size
    ids, begins = _encoded(document[:size], tokenizer)
    origin = given = 0  # where the piece begins; how many of its tokens the piece before has given
    while origin + size < len(document):
        for shared in range(OVERLAP, min(TRIES * OVERLAP, size - 1) + 1, OVERLAP):
            step = size - shared
            start = origin + step
            next_ids, next_begins = _encoded(document[start : start + size], tokenizer)
            here = _between(begins, step + OVERLAP // 4, step + 3 * OVERLAP // 4)
            there = _between(next_begins, OVERLAP // 4, 3 * OVERLAP // 4)
            places = [[begin - step for begin in begins[here]], next_begins[there]]
            if ids[here] and ids[here] == next_ids[there] and places[0] == places[1]:
                break
        else:
            yield None
            return
        yield ids[given : here.start]
        ids, begins, origin, given = next_ids, next_begins, start, there.start
    yield ids[given:]


def _encoded(text: str, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids, and the character at which each begins."""
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return found["input_ids"], [begin for begin, _ in found["offset_mapping"]]


def _between(begins: list[int], first: int, last: int) -> slice:
    """The tokens that begin at characters from `first` up to `last`."""
    inside = [number for number, begin in enumerate(begins) if first <= begin < last]
    return slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)


# The beginning of a text
# -------------------------------------------------------------------------------------------------


def beginning(tokenizer, bos: bool | None = None) -> int | None:
    """The token (BOS) that windows of this tokenizer's texts begin with; None: no such one.

    bos None: what the tokenizer itself puts before an encoded text, if that is its BOS. True: its
    BOS in any case, ValueError where it has none. False: None."""
    check_bos(bos)
    token = getattr(tokenizer, "bos_token_id", None)
    if bos and token is None:
        raise ValueError("bos: got True, the tokenizer has no BOS token; valid is False")
    if bos is None and token is not None:
        bos = list(tokenizer("a", verbose=False)["input_ids"])[:1] == [token]
    return token if bos else None


def check_bos(bos: bool | None) -> None:
    """ValueError for anything but True, False or None."""
    if bos is not None and not isinstance(bos, bool):
        raise ValueError(
            f"bos: got {bos!r}, valid is True, False or None (as the tokenizer does it)"
        )


def begun(ids: torch.Tensor, bos: int | None) -> torch.Tensor:
    """Windows of token ids (..., T) that begin with `bos`: it takes the place of the first token,
    so that windows stay as long as they are, and one that begins with it already stays as it is.
    `ids` itself where it is None."""
    if bos is None:
        return ids
    ids = ids.clone()
    ids[..., 0] = bos
    return ids
