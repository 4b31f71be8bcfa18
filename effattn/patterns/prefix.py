"""The prefix of a prefix-LM: first tokens of each row that see each other in both directions.

B: rows; Hq, Hkv: query and key/value heads; T: tokens; D, Dv: of a key, of a value."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from effattn.calls import Call
from effattn.errors import Unsupported
from effattn.kernels import flash
from effattn.kernels.flash.pattern import Layout, Pattern
from effattn.positions.bound import Positions
from effattn.states.base import State


def mask_of(prefix: Tensor, k: Tensor, padding_mask: Tensor | None) -> Tensor:
    """`prefix`, (B,) int or (B, T) bool, as (B, T) bool: its real tokens. ValueError for what is
    neither, or no beginning of its row. k (B, Hkv, T, D)."""
    rows, tokens = k.shape[0], k.shape[2]
    real = padding_mask
    if real is None or real.shape != (rows, tokens):
        real = torch.ones(rows, tokens, dtype=torch.bool, device=k.device)
    place = real.cumsum(dim=1) - 1
    tensor = isinstance(prefix, Tensor) and prefix.device == k.device
    if tensor and prefix.shape == (rows,) and prefix.dtype in (torch.int64, torch.int32):
        if not (prefix >= 0).all() or not (prefix <= real.sum(dim=1)).all():
            raise ValueError(
                f"prefix: got lengths {prefix.tolist()}, valid are 0 to each row's real tokens, "
                f"{real.sum(dim=1).tolist()}"
            )
        return real & (place < prefix[:, None])
    if not tensor or prefix.shape != (rows, tokens) or prefix.dtype != torch.bool:
        got = f"{prefix.dtype} {tuple(prefix.shape)}" if isinstance(prefix, Tensor) else prefix
        raise ValueError(
            f"prefix: got {got}, valid are lengths ({rows},) of torch.int64, or torch.bool "
            f"({rows}, {tokens}), on {k.device}"
        )
    prefix = prefix & real
    if not torch.equal(prefix, real & (place < prefix.sum(dim=1, keepdim=True))):
        raise ValueError(
            "prefix: got a mask with tokens behind one that is not in it, valid are the first real "
            "tokens of each row"
        )
    return prefix


def check(q: Tensor, k: Tensor, causal: bool, state: State | None, rule, documents) -> None:
    """Unsupported for what a prefix does not go with."""
    refused = None
    if not causal:
        refused = "causal=False, where everything is seen in both directions already"
    elif state is not None and (state.packed or state.static):
        refused = "packed keys, or a static cache; valid is a full cache"
    elif state is not None and state.seq_len:
        refused = f"{state.seq_len} tokens in the state; valid is a prefix in its first call"
    elif q.shape[2] != k.shape[2]:
        refused = f"{q.shape[2]} queries and {k.shape[2]} keys; valid are whole sequences"
    elif documents is not None:
        refused = "documents; valid is one sequence a row"
    elif isinstance(rule, Positions) and rule.causal_only:
        refused = f"positions {rule.spec!r}, which are defined for causal attention alone"
    if refused is not None:
        raise Unsupported(f"prefix: got it with {refused}")


def joined(given, q: Tensor, k: Tensor, v: Tensor, call: Call, impl: str, lse: bool):
    """`given`, causal attention's out (B, Hq, T, Dv), and with `lse` its log-sum-exps (B, Hq, T);
    but the tokens of `call.prefix` see their prefix, and nothing else.

    What is computed for other tokens before the end of the longest prefix is dropped."""
    end = int(call.prefix.any(dim=0).nonzero().amax()) + 1 if call.prefix.any() else 0
    if not end:
        return given
    drop = call.drop and replace(
        call.drop, q=call.drop.q[:, :, :end], k=call.drop.k[:, :end].expand(len(q), -1)
    )
    both = flash.attention(
        *(x[:, :, :end] for x in (q, k, v)),
        Pattern(),
        Layout(start=call.layout.start, mask=call.prefix[:, :end]),
        causal=False,
        scale=call.scale,
        softcap=call.softcap,
        bias=call.bias,
        drop=drop,
        impl=impl,
        lse=lse,
    )
    inside = call.prefix[:, None, :end]

    def put(x: Tensor, other: Tensor) -> Tensor:
        own = inside[..., None] if x.ndim == 4 else inside
        return torch.cat([torch.where(own, other, x[:, :, :end]), x[:, :, end:]], dim=2)

    if not lse:
        return put(given, both)
    return tuple(put(x, other) for x, other in zip(given, both, strict=True))
