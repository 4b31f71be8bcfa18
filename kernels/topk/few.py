"""Attention of a few new tokens to their chosen blocks and the sinks, over a cache: those keys are
gathered, and attended to at once by the decode kernels. Forward only.

B: rows; Hq, H: query and key/value heads; n: blocks of a query; R = sinks + n block keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import decode
from .selection import Rule, far_keys, work_dtype

Read = Callable[[Tensor], tuple[Tensor, Tensor]]


def reader(k: Tensor, v: Tensor) -> Read:
    """Of keys (B, H, T, D) and values (B, H, T, Dv), all tokens, those of numbers (B, H, n)."""

    def read(number: Tensor) -> tuple[Tensor, Tensor]:
        at = number.clamp(max=k.shape[2] - 1)[..., None]
        return tuple(x.gather(2, at.expand(-1, -1, -1, x.shape[3])) for x in (k, v))

    return read


def attention_few(
    q: Tensor,
    read: Read,
    rule: Rule,
    chosen: Tensor,
    at: Tensor,
    start: Tensor | None = None,
    *,
    sinks: bool = True,
    scale: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `attention`, and with `sinks` those of them that are not in the window too. q (B, Hq, Tq,
    D); read: keys and values of tokens by number, as `reader` does, all tokens with their padding,
    which ends at `start` (B,) int64 (None: there is none); chosen (B, H, Tq, n), at (1 or B,
    Tq)."""
    (batch, heads, queries, dim), kv_heads = q.shape, chosen.shape[1]
    place = torch.arange(rule.block, device=q.device)
    key = (chosen[..., None] * rule.block + place).flatten(3).clamp(min=0)
    seen = far_keys(rule, at[:, None], chosen).flatten(3)
    if rule.sinks and sinks:
        sink = torch.arange(rule.sinks, device=q.device)
        old = (at[:, None, :, None] - sink >= rule.window).expand(*seen.shape[:3], -1)
        key = torch.cat([sink.expand(old.shape), key], dim=3)
        seen = torch.cat([old, seen], dim=3)
    count = key.shape[3]
    number = key if start is None else key + start[:, None, None, None]
    k, v = read(number.flatten(2))
    if not count:  # a sequence that is shorter than a block
        out = q.new_zeros(batch, heads, queries, v.shape[3])
        return out, torch.full_like(out[..., 0], -torch.inf, dtype=work_dtype(q))

    def by_query(x: Tensor) -> Tensor:  # one query each, with keys of its own
        return x.unflatten(2, (queries, count)).transpose(1, 2).flatten(0, 1)

    counts = seen.transpose(1, 2).repeat_interleave(heads // kv_heads, dim=2)
    out, lse = decode.attention(
        q.transpose(1, 2).reshape(-1, heads, 1, dim),
        by_query(k),
        by_query(v),
        counts=counts.reshape(-1, heads, 1, count),
        scale=scale,
        impl=impl,
        lse=True,
    )
    shape = (batch, queries, heads)
    return out.view(*shape, -1).transpose(1, 2), lse.view(shape).transpose(1, 2)
