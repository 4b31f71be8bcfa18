"""Exact attention of a few new tokens over latents: of each token that was, r numbers are kept.

    maps = Maps(key, value)                          # (Hkv, D, r) and (Hkv, Dv, r)
    out = attention(q, c, maps, turn=Turn(inv_freq)) # q (B, Hq, 1 to 16, D), c (B, T, r)

Keys are K = W_UK c, made a tile at a time and turned as raw keys are. Values are never made: their
sum is W_UV applied to the weighted sum of latents (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

Forward only. B: rows; Hq, Hkv: query and key/value heads; T: tokens held; D, Dv: of a key, of a
value; r: of a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decode.turn import Turn
from ..decode.turn import check as check_turn
from ..flash import choose
from ..flash.pattern import Layout, Pattern
from ..flash.rules import Bias
from ..rows import dense_rows
from .packed import PackedLatents, dense

__all__ = ["IMPLEMENTATIONS", "Latent", "Maps", "PackedLatents", "attention"]

IMPLEMENTATIONS = ("auto", "torch", "triton")


@dataclass(frozen=True, eq=False)
class Maps:
    """How keys and values come of latents.

    key (Hkv, D, r), value (Hkv, Dv, r), key_bias (Hkv, D) and value_bias (Hkv, Dv), or None: K is
    key c + key_bias, V likewise. key_norm: what keys (B, Hkv, T, D) go through before they turn;
    None: nothing."""

    key: Tensor
    value: Tensor
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    key_norm: Callable[[Tensor], Tensor] | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.key.shape[-1]

    def keys(self, c: Tensor) -> Tensor:
        """c (B, T, r) -> (B, Hkv, T, D), before their rotation."""
        k = _expand(c, self.key, self.key_bias)
        return k if self.key_norm is None else self.key_norm(k)

    def values(self, c: Tensor) -> Tensor:
        """c (B, T, r) -> (B, Hkv, T, Dv)."""
        return _expand(c, self.value, self.value_bias)

    def absorbed(self, sums: Tensor) -> Tensor:
        """Weighted sums of latents (B, Hq, Tq, r), weights that sum to 1 -> the same sums of values
        (B, Hq, Tq, Dv)."""
        kv_heads, dim, rank = self.value.shape
        value = self.value.to(sums).transpose(1, 2)
        if len(sums) == 1:
            out = torch.bmm(sums.reshape(kv_heads, -1, rank), value)
        else:
            out = sums.reshape(len(sums), kv_heads, -1, rank) @ value
        if self.value_bias is not None:
            out = out + self.value_bias.to(sums)[:, None]
        return out.reshape(*sums.shape[:3], dim)


@dataclass(frozen=True, eq=False)
class Latent:
    """A call's new tokens as latents c (B, 1, T, r), and the layer's maps."""

    c: Tensor
    maps: Maps


def _expand(c: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # one product for all heads: (B, T, r) times (r, Hkv D)
    flat = torch.nn.functional.linear(
        c, weight.to(c).flatten(0, 1), None if bias is None else bias.to(c).flatten()
    )
    return flat.unflatten(-1, weight.shape[:2]).transpose(1, 2)


def attention(
    q: Tensor,
    c: Tensor | PackedLatents,
    maps: Maps,
    pattern: Pattern | None = None,
    layout: Layout | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    q_first: Tensor | None = None,
    turn: Turn | None = None,
    bias: Bias | None = None,
    impl: str = "auto",
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of q (B, Hq, Tq, D), Tq <= 16, over the tokens whose latents are c (B, T,
    r): (B, Hq, Tq, Dv) in q's dtype, with `lse` also the log-sum-exps (B, Hq, Tq).

    Packed latents are unpacked a tile at a time in plain torch, all at once for Triton. The others
    are those of `effattn.kernels.decode.attention`. Queries that see no key give 0.
    impl: "auto", "torch" or "triton". ValueError for latents of another rank than the maps', for
    rules that exclude each other, and for dtypes and gradients that the Triton kernels lack."""
    if c.ndim != 3 or c.shape[-1] != maps.rank:
        raise ValueError(f"c: got {tuple(c.shape)}, valid is (rows, tokens, {maps.rank})")
    pattern, layout = pattern or Pattern(), layout or Layout()
    q, q_first = dense_rows(q), dense_rows(q_first)
    c = c if isinstance(c, PackedLatents) else dense_rows(c)
    check_turn(turn, bias, q, pattern, True, q_first)
    if impl not in IMPLEMENTATIONS:
        valid = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"latent: impl: got {impl!r}, valid are {valid}")
    if choose(impl, q.device) == "triton":
        from .triton_impl import attention as run

        c = dense(c)
    else:
        from .torch_impl import attention as run
    out, sums = run(
        q,
        c,
        maps,
        pattern,
        layout,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        q_first=q_first,
        turn=turn,
        bias=bias,
        need_lse=lse,
    )
    return (out, sums) if lse else out  # type: ignore[return-value]  # with `lse`, sums are there
