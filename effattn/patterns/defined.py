"""An exact pattern by its definition, where no kernel has what a call asks for: every pair is
scored, some queries at a time, so that memory is linear in the keys; forward and backward.

B: rows; Hq, Hkv: query and key/value heads; Tq, Tk: queries, the last of all tokens, and keys; D,
Dv: of a key, of a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effattn.interface import Call
from effattn.kernels.decode.torch_impl import attention
from effattn.kernels.flash.dropout import Dropout
from effattn.kernels.flash.pattern import Layout, Pattern
from effattn.kernels.flash.rules import Far

SCORES = 1 << 23  # at a time, at most, where there are more queries than one

# (q (B, Hq, n, D), k (B, Hkv, Tk, D), their call) -> how often each query sees each key
Counts = Callable[[Tensor, Tensor, Call], Tensor]


def by_definition(
    counts: Counts, pattern: Pattern | None, q: Tensor, k: Tensor, v: Tensor, call: Call, lse: bool
):
    """out (B, Hq, Tq, Dv) in q's dtype, and the log-sum-exp (B, Hq, Tq) with `lse`. In plain torch.

    pattern: which keys are the first ones, that `call.q_first` sees. The keys may lie in a ring,
    whose queries are few, and are then one step."""
    queries, keys = q.shape[2], k.shape[2]
    step = max(1, SCORES // (q.shape[0] * q.shape[1] * keys))
    step = queries if call.layout.ring is not None else step

    def part(a: int, b: int, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None):
        own = _part(call, a, b, queries, keys, *others)
        return attention(
            q[:, :, a:b],
            k,
            v,
            pattern or Pattern(),
            own.layout,
            causal=own.causal,
            scale=own.scale,
            softcap=own.softcap,
            q_first=own.q_first,
            counts=counts(q[:, :, a:b], k, own),
            need_lse=True,
            turn=own.turn,
            far=own.far,
            bias=own.bias,
            drop=own.drop,
        )

    far = (None, None) if call.far is None else (call.far.q, call.far.k)
    inputs = (q, k, v, call.q_first, *far)
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if call.bias is not None and torch.is_grad_enabled():
        learning = learning or call.bias.params.requires_grad
    found = []
    for a in range(0, queries, step):
        b = min(a + step, queries)
        if learning and step < queries:  # scores are made again in the backward pass
            kept = dict(use_reentrant=False, preserve_rng_state=False)
            found.append(checkpoint(part, a, b, *inputs, **kept))
        else:
            found.append(part(a, b, *inputs))
    out, sums = (torch.cat(each, dim=2) for each in zip(*found, strict=True))
    return (out, sums) if lse else out


def _part(
    call: Call, a: int, b: int, queries: int, keys: int, q_first, q_far=None, k_far=None
) -> Call:
    """`call` for its queries [a, b)."""
    if (a, b) == (0, queries):
        return call
    layout: Layout = replace(call.layout, total=call.layout.tokens(keys) - queries + b)
    drop: Dropout | None = call.drop
    return replace(
        call,
        layout=layout,
        q_first=None if q_first is None else q_first[:, :, a:b],
        far=None if call.far is None else Far(q_far[:, :, a:b], k_far, call.far.window),
        drop=None if drop is None else replace(drop, q=drop.q[:, :, a:b]),
        global_mask=call.global_mask,
    )
