"""What may not change between two calls with one state: the sizes of its keys and values.

B: rows of the batch; Hkv: key/value heads; T: tokens; D, Dv: of a key, of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class NoSuchRow(ValueError, IndexError):
    """A row of the batch that is not there."""


def check_rows(argument: str, index: Tensor, batch: int) -> None:
    """NoSuchRow unless `index` (N,) int64 names rows of a batch. On a device that the host would
    have to wait for, it is the device that stops."""
    if not len(index):
        return
    if index.device.type != "cpu":
        torch._assert_async(
            ((index >= 0) & (index < batch)).all(), f"{argument}: valid are rows 0 to {batch - 1}"
        )
    elif not 0 <= int(index.min()) <= int(index.max()) < batch:
        raise NoSuchRow(f"{argument}: got rows {index.tolist()}, valid are 0 to {batch - 1}")


class Sizes(NamedTuple):
    """What the first keys and values of a state were like; only the number of tokens may differ
    afterwards.
    """

    batch: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Sizes:
        """Of new keys (B, Hkv, T, D) and values (B, Hkv, T, Dv)."""
        batch, kv_heads, _, head_dim = k.shape
        return cls(batch, kv_heads, head_dim, v.shape[3], k.dtype, k.device)


def check_fits(k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor) -> None:
    """ValueError where held keys and values, and new ones, differ in more than the number of
    tokens.
    """
    for which, old, new in (("k", k, new_k), ("v", v, new_v)):
        (batch, heads, _, dim), like = old.shape, new.shape
        fits = batch == like[0] and heads == like[1] and dim == like[3]  # no tuples are made of it
        if not fits or old.dtype != new.dtype:
            raise ValueError(
                f"{which}: the state holds {tuple(old.shape)} {old.dtype}, got new tokens "
                f"{tuple(new.shape)} {new.dtype}; only the number of tokens may differ"
            )


def check_sizes(sizes: Sizes, tokens: int, k: Tensor, v: Tensor) -> None:
    """ValueError where new keys and values do not fit those that a state of so many tokens began
    with.
    """
    new = Sizes.of(k, v)
    if new == sizes:
        return
    for which, dim, given in (("k", sizes.head_dim, k), ("v", sizes.value_dim, v)):
        old = (sizes.batch, sizes.kv_heads, tokens, dim)
        if (old[:2], dim, sizes.dtype) != (given.shape[:2], given.shape[3], new.dtype):
            raise ValueError(
                f"{which}: the state holds {old} {sizes.dtype}, got new tokens "
                f"{tuple(given.shape)} {new.dtype}; only the number of tokens may differ"
            )
    if new.device != sizes.device:
        raise ValueError(
            f"k: the state is on {sizes.device}, got new tokens on {new.device}; state.move() "
            "moves it"
        )
