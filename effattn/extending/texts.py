"""The sequences that rules are compared on: long documents, the same text repeated, and short
repeats to copy.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from effattn.encoding import token_ids


def long_sequences(texts: Iterable[str], tokenizer, count: int, length: int) -> Tensor:
    """`count` stretches of `length` + 1 tokens, each within one document, int64 (count, length +
    1): first the starts of all documents that are so long, then their second stretches, and so on.
    ValueError where there are too few."""
    by_place: dict[int, list[Tensor]] = {}
    for text in texts:
        ids = torch.tensor(token_ids(text, tokenizer, count * length + 1), dtype=torch.int64)
        for place in range((len(ids) - 1) // length):
            by_place.setdefault(place, []).append(ids[place * length : (place + 1) * length + 1])
        if len(by_place.get(0, ())) == count:
            break
    found = [one for place in sorted(by_place) for one in by_place[place]]
    if len(found) < count:
        raise ValueError(
            f"sequences: got {count} of {length:,} tokens, the text has documents for "
            f"{len(found)}; ask for fewer or shorter ones, or give more text"
        )
    return torch.stack(found[:count])


def windows(sequences: Tensor, length: int) -> Tensor:
    """The same tokens in windows of `length`, which divides T: (n, T + 1) -> (n T / length, length
    + 1). Windows share one token, so that each of the T predictions is made once."""
    return torch.cat([row.unfold(0, length + 1, length) for row in sequences])


def repeated(sequences: Tensor, period: int) -> Tensor:
    """The first `period` tokens of each row over and over, in the same shape."""
    times = -(-sequences.shape[1] // period)
    return sequences[:, :period].repeat(1, times)[:, : sequences.shape[1]]
