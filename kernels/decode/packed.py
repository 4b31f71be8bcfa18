"""Exact softmax attention over a cache whose older tokens are packed (`effattn.kernels.pack`): one
launch over the packed keys and those in full precision, so that no step unpacks the cache.

    # k, v: Codes of the older tokens; k_rest, v_rest: the newest ones in full precision
    cache = PackedCache(k, v, k_rest, v_rest, total=5000)
    out = attention(q, cache, Window(back=4096))  # q (B, Hq, Tq, D)

Forward only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from ..flash.pattern import Layout, Pattern
from ..flash.rules import Bias
from ..flash.rules import check as check_rules
from ..pack.codes import Codes, Pages
from .turn import Turn
from .turn import check as check_turn

__all__ = ["IMPLEMENTATIONS", "PackedCache", "attention", "choose"]


@dataclass
class PackedCache:
    """K and V of one layer, in up to three parts. Tokens are numbered from 0 in each row, padding
    included, and the queries are the last ones of `total`; a token's position is its number minus
    its row's `start`.

    k_first, v_first (B, Hkv, S, D), (B, Hkv, S, Dv): the tokens at POSITIONS 0 .. S - 1 of each
        row, in full precision. They are seen from here only: a packed or newest key at a position
        below S is skipped, so a token may be held twice (rows with padding on the left), but must
        be in these slots as soon as it is in the cache.
    k, v: the packed tokens, N of them; key n is token number `packed_from` + n, or
        `packed_numbers[n]`. `Pages` are for plain torch.
    k_rest, v_rest (B, Hkv, R, D), (B, Hkv, R, Dv): the newest tokens in full precision, q's dtype,
        numbers total - R .. total - 1, or `rest_numbers`.
    packed_numbers (N,), rest_numbers (R,) int64: for rings and for buffers with room: -1 is a place
        without a token; numbers may come in any order. What lies there must be finite.
    total: how many tokens there are so far, held or not, the queries' own included; an int, or a
        0-d int64 tensor for graphs that are compiled once (then both numbers are given).
    start (B,) int64: the number of each row's first real token; None: 0.
    mask (B, S + N + R) bool, in the order of the parts: which of the keys are real; None: all.
    """

    k: Codes | Pages
    v: Codes | Pages
    k_rest: Tensor
    v_rest: Tensor
    total: int | Tensor
    k_first: Tensor | None = None
    v_first: Tensor | None = None
    packed_from: int = 0
    packed_numbers: Tensor | None = None
    rest_numbers: Tensor | None = None
    start: Tensor | None = None
    mask: Tensor | None = None

    @property
    def slots(self) -> int:
        """S, first tokens in full precision."""
        return 0 if self.k_first is None else self.k_first.shape[2]

    @property
    def keys(self) -> int:
        """S + N + R."""
        return self.slots + self.k.tokens + self.k_rest.shape[2]

    @property
    def nbytes(self) -> int:
        """Of K and V in all parts."""
        full = (self.k_first, self.v_first, self.k_rest, self.v_rest)
        return self.k.nbytes + self.v.nbytes + sum(x.nbytes for x in full if x is not None)

    def numbers(self) -> Tensor:
        """(N + R,) int64: the numbers of the packed and the newest keys; -1: no token."""
        packed, device = self.packed_numbers, self.k.device
        if packed is None:
            packed = torch.arange(self.packed_from, self.packed_from + self.k.tokens, device=device)
        rest = self.rest_numbers
        if rest is None:
            rest = torch.arange(self.total - self.k_rest.shape[2], self.total, device=device)
        return torch.cat([packed, rest])

    def key_positions(self) -> Tensor:
        """(1 or B, S + N + R) int64: each key's position, -1 for keys that are not to be seen."""
        number = self.numbers()[None]
        origin = 0 if self.start is None else self.start[:, None]
        position = torch.where(number >= 0, number - origin, -1)
        position = torch.where(position >= self.slots, position, -1)
        first = torch.arange(self.slots, device=number.device)
        position = torch.cat([first[None].expand(position.shape[0], -1), position], dim=1)
        return position if self.mask is None else torch.where(self.mask, position, -1)

    def query_positions(self, queries: int) -> Tensor:
        """(1 or B, Tq) int64; negative for padding on the left."""
        number = torch.arange(queries, device=self.k.device)[None] + (self.total - queries)
        return number if self.start is None else number - self.start[:, None]


def attention(
    q: Tensor,
    cache: PackedCache,
    pattern: Pattern | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    q_first: Tensor | None = None,
    turn: Turn | None = None,
    bias: Bias | None = None,
    impl: str = "auto",
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys that each query may see: (B, Hq, Tq, Dv) in q's dtype,
    any Tq.

    pattern: `Pattern`, `Window` or `Blocks` with `first`; scale defaults to D^-0.5; softcap c makes
    each score c tanh(score / c). q_first (B, Hq, Tq, D): the queries as keys at positions below
    `pattern.first` see them, which must all be slots. turn: keys are held raw and rotated when they
    are read. bias: what distances add to scores. With `lse` also the log-sum-exp of each query's
    scores (B, Hq, Tq), fp32. A query that sees nothing gives 0 and -inf. ValueError for what an
    implementation cannot do."""
    pattern = pattern or Pattern()
    if q_first is not None and pattern.first > cache.slots:
        raise ValueError(
            f"q_first: got pattern.first = {pattern.first}, but the cache holds {cache.slots} "
            "first tokens in full "
            f"precision; valid is at most {cache.slots}"
        )
    check_rules(None, bias, q, q, pattern, Layout(), causal, q_first)
    # first queries are slots here, which see no far keys
    check_turn(turn, bias, q, Pattern(), causal, None)
    name = choose(impl, q.device)
    if isinstance(cache.k, Pages) and name != "torch":
        raise ValueError(f"cache: got Pages, valid with {name!r} are Codes")
    if name == "triton":
        from .packed_triton import attention as run
    elif name == "reference":
        from .packed_reference import attention as run
    else:
        from .packed_torch import attention as run
    out, sums = run(
        q,
        cache,
        pattern,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        q_first=q_first if pattern.first else None,
        turn=turn,
        bias=bias,
        need_lse=lse,
    )
    return (out, sums) if lse else out
