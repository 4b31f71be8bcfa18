"""Sinks (keys at a row's first positions that all later queries see) under a position rule that
does more than turn by fixed angles: ReRoPE, ALiBi, xPOS, frequencies that follow the length.

A rule speaks of distances, and a sink's is that of its place in the cache (StreamingLLM,
arXiv:2309.17453, section 3.2, which says so of RoPE and of ALiBi): the query stands at `farthest`,
the last place of sinks and window, once it is beyond it. Keys of the window keep their distance; so
the two are scored apart, and merged by their log-sum-exps.

B: rows; Hq, Hkv: query and key/value heads; Tq, Tk: queries and keys; s: sinks; D, Dv: of a key, of
a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.kernels.decode.torch_impl import attention
from effattn.kernels.flash.dropout import Dropout
from effattn.kernels.flash.pattern import Layout, Pattern
from effattn.positions.bound import Placed, Positions


@dataclass(frozen=True, eq=False)
class Sinks:
    """The sinks of a call that its window does not show, where a rule puts them.

    placed: q (B, Hq, Tq, D) and k (B, Hkv, s, D), what distant pairs use instead, and the bias; v
    (B, Hkv, s, Dv). index (B, s): which of the given keys they are. distance (1 or B, Tq, s) int64,
    by place in the cache; visible (1 or B, Tq, s) bool."""

    placed: Placed
    v: Tensor
    index: Tensor
    distance: Tensor
    visible: Tensor

    @classmethod
    def of(
        cls,
        rule: Positions,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        sinks: int,
        farthest: int,
    ) -> Sinks:
        """Of raw q (B, Hq, Tq, D), k (B, Hkv, Tk, D), and v (B, Hkv, Tk, Dv). farthest: the last
        place of sinks and window."""
        rows, keys = k.shape[0], k.shape[2]
        position = layout.key_positions(keys, k.device)
        inside = (position >= 0) & (position < sinks)
        index = (~inside).int().argsort(dim=1, stable=True)[:, : min(sinks, keys)]
        at_k, there = position.gather(1, index).clamp(min=0), inside.gather(1, index)
        index = index.expand(rows, -1)
        k, v = (
            x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
            for x in (k, v)
        )
        i = layout.query_positions(q.shape[2], keys, q.device)
        beyond = i[:, :, None] - at_k[:, None] > farthest - sinks  # out of the window
        at_q = i.clamp(min=0, max=farthest)
        length = at_q.amax(dim=-1) + 1
        one = layout.start is None
        placed = rule.place(
            q,
            k,
            at_q[0] if one else at_q,
            at_k[0] if one and len(at_k) == 1 else at_k.expand(rows, -1),
            min(layout.tokens(keys), farthest + 1) if one else length,
            farthest + 1,
        )
        distance = at_q[:, :, None] - at_k[:, None]
        return cls(placed, v, index, distance, there[:, None] & beyond & (i >= 0)[:, :, None])

    def attention(
        self, scale: float, softcap: float | None, drop: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        """out (B, Hq, Tq, Dv) and the log-sum-exp (B, Hq, Tq), over the sinks alone, in plain
        torch. drop: of all keys of the call."""
        if drop is not None:
            keys = drop.k.expand(len(self.index), -1).gather(1, self.index)
            drop = Dropout(drop.rate, drop.q, keys)
        return attention(
            self.placed.q,
            self.placed.k,
            self.v,
            Pattern(),
            Layout(),
            causal=True,
            scale=scale,
            softcap=softcap,
            q_first=None,
            counts=self.visible[:, None],
            need_lse=True,
            far=self.placed.far,
            bias=self.placed.bias,
            drop=drop,
            distance=self.distance,
        )


def needs(rule: object, farthest: int | None) -> bool:
    """Whether a backend whose first keys see a query at `farthest` at most has to score them apart
    under `rule`."""
    return farthest is not None and isinstance(rule, Positions) and (rule.raw_keys or rule.scores)


def cached_length(length: int | Tensor, farthest: int) -> int | Tensor:
    """The tokens that a rule's frequencies follow: no more than a cache of sinks and window has."""
    if isinstance(length, Tensor):
        return torch.clamp(length, max=farthest + 1)
    return min(length, farthest + 1)
