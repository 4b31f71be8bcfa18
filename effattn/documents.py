"""Documents that lie in a row one behind the other, for methods that know one sequence a row.

    attn(q, k, v, documents=numbers)         # numbers (B, T): 0 0 0 1 1 1 1 2 2 -1 -1

Tokens see their own document only, and positions count from its first token, so that windows,
blocks, sinks, global tokens, sums and position rules begin anew in each: a packed batch gives what
its documents give one by one. Here the documents of one length become the rows of one call, and
those of another length those of the next: no pair of two documents is ever visited, whatever the
method. Tokens are moved only where the documents do not lie in this order already, which those of
one length do.

B: rows; H: heads; T: tokens; D: of a head; N: tokens of all documents; n: documents of one length
L."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from effattn.errors import Unsupported
from effattn.padding import of_tokens


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of a batch of `shape` (B, T) are.

    groups: (how many, of which length), the shortest first. order (N,) int64: the tokens in the
    order of the groups, each as its number in the flat batch; None: as they lie, and all are in a
    document."""

    shape: tuple[int, int]
    groups: list[tuple[int, int]]
    order: Tensor | None

    @classmethod
    def of(cls, numbers: Tensor) -> Documents:
        """Of numbers (B, T), negative for padding: tokens of a row with the same one are a
        document. ValueError for a number that comes again behind another one."""
        rows, tokens = numbers.shape
        flat = numbers.detach().cpu().flatten()
        at = (flat >= 0).nonzero()[:, 0]
        row, number = at // max(tokens, 1), flat[at]
        begins = torch.ones_like(at, dtype=torch.bool)
        begins[1:] = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
        first = begins.nonzero()[:, 0]
        _refuse_returns(row[first], number[first])
        lengths = torch.cat([first, first.new_tensor([len(at)])]).diff()
        # documents of one length stay in the order that they have
        order = at[lengths.repeat_interleave(lengths).argsort(stable=True)]
        sizes, counts = lengths.unique(return_counts=True)
        groups = list(zip(counts.tolist(), sizes.tolist(), strict=True))
        if torch.equal(order, torch.arange(rows * tokens)):
            return cls((rows, tokens), groups, None)
        return cls((rows, tokens), groups, order.to(numbers.device))

    def gathered(self, x: Tensor) -> Tensor:
        """x (B, H, T, D) -> the documents' tokens, (N, H, D) in the order of the groups."""
        flat = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
        return flat if self.order is None else flat[self.order]

    def split(self, x: Tensor) -> list[Tensor]:
        """x (B, H, T, D) -> of each group (n, H, L, D)."""
        # One split: its gradient is one concatenation. That of slices would be a tensor of all
        # tokens for each.
        parts = self.gathered(x).split([count * length for count, length in self.groups])
        return [
            part.unflatten(0, group).transpose(1, 2)
            for part, group in zip(parts, self.groups, strict=True)
        ]

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Of each group (n, H, L, D) -> (B, H, T, D), 0 for tokens of no document."""
        flat = [part.transpose(1, 2).flatten(0, 1) for part in parts]
        out = flat[0] if len(flat) == 1 else torch.cat(flat)
        if self.order is not None:
            all_tokens = out.new_zeros(self.shape[0] * self.shape[1], *out.shape[1:])
            out = all_tokens.index_copy(0, self.order, out)
        return out.unflatten(0, self.shape).transpose(1, 2)


def _refuse_returns(row: Tensor, number: Tensor) -> None:
    """ValueError where a document of this row and number comes twice."""
    pairs, counts = torch.stack([row, number]).unique(dim=1, return_counts=True)
    if (counts > 1).any():
        r, n = pairs[:, counts > 1][:, 0].tolist()
        raise ValueError(
            f"documents: number {n} comes again in row {r} behind another document; valid is one "
            "number for each stretch of a row, negative for padding"
        )


# what is known of numbers, until somebody writes to them: all layers of a model ask about the same
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def known(numbers: Tensor) -> Documents:
    """`Documents.of`, which is looked for once."""
    version = None if numbers.is_inference() else numbers._version
    before, found = _known.get(numbers, (None, None))
    if found is None or version is None or before != version:
        found = Documents.of(numbers)
        _known[numbers] = version, found
    return found


def check(numbers, q: Tensor, k: Tensor, state) -> None:
    """ValueError for numbers that are not those of q's tokens (B, T), Unsupported for a call that
    is no whole sequence: q (B, Hq, T, D), k (B, Hkv, T, D). None is no documents."""
    if numbers is None:
        return
    if not isinstance(numbers, Tensor):
        raise ValueError(
            f"documents: expected an int tensor {_shape(q)}, got {type(numbers).__name__}"
        )
    if state is not None:
        raise Unsupported(
            "documents: got a state too, which holds one sequence a row; valid is a call without"
        )
    if q.shape[2] != k.shape[2]:
        raise Unsupported(
            f"documents: got {q.shape[2]} queries and {k.shape[2]} keys, valid are whole sequences"
        )
    whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if numbers.shape != _shape(q) or not whole or numbers.device != q.device:
        raise ValueError(
            f"documents: expected an int tensor {_shape(q)} on {q.device}, got {numbers.dtype} "
            f"{tuple(numbers.shape)} on {numbers.device}"
        )
    if torch.compiler.is_compiling():
        raise Unsupported(
            "documents: where they are is looked up, which a compiled graph cannot; valid is a "
            "call outside of one"
        )


def _shape(q: Tensor) -> tuple[int, int]:
    return q.shape[0], q.shape[2]


def attend(
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, dict], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    numbers: Tensor | None,
    mask: Tensor | None,
    extras: dict,
) -> Tensor:
    """`run(q, k, v, padding_mask, extras)` over the documents, (B, Hq, T, Dv), 0 for padding; over
    the rows as they are where there are no `numbers`.

    q (B, Hq, T, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv); numbers: as `Documents.of` takes them;
    mask (B, T) bool: real tokens, None: all. extras: arguments beside, some of which have tokens
    too (`padding.of_tokens`)."""
    if numbers is None:
        return run(q, k, v, mask, extras)
    found = known(numbers) if mask is None else Documents.of(numbers.masked_fill(~mask, -1))
    if not found.groups:
        return run(q, k, v, torch.zeros_like(numbers, dtype=torch.bool), extras)
    split, outs = cache(found.split), []
    for n in range(len(found.groups)):

        def of_group(x: Tensor, n: int = n) -> Tensor:
            return split(x)[n]

        outs.append(run(*map(of_group, (q, k, v)), None, of_tokens(extras, of_group, of_group)))
    return found.joined(outs)
