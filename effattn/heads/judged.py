"""Which merge is best where attention does not get what the projections give: it is tried, and
measured.

Behind a q/k norm with gains, or a clip, a merge that turns or scales heads is no longer undone by
the query or the output projection, and second moments of the input do not tell its error. Each
candidate is written into a copy of the attention module, and its error is taken from what attention
gets before and after.

N: tokens; D: hidden size; H: query heads; d: size of a head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effattn.calibration.attended import attended
from effattn.heads.methods.base import Merged, Method
from effattn.hf.anatomy import Layer

TOKENS = 4096  # that candidates are judged on, spread over the calibration text


@dataclass(frozen=True)
class Judged:
    """The best merge of every group, the method that made its keys, and its errors as
    `relative_errors`.
    """

    merged: list[Merged]
    key_method: str
    k_error: float
    v_error: float


def judge(
    layer: Layer,
    groups: list[list[int]],
    merge: Callable[[Method], list[Merged]],
    method: Method,
    inputs: Tensor,
    write: Callable[[Layer, list[list[int]], list[Merged]], None],
) -> Judged:
    """The merge whose keys and whose values lose least. inputs (N, D): what the attention module
    gets.

    merge: the merge of every group by a method. write: writes such a merge into a layer.
    """
    tried = []
    for one in (method, *method.instead):
        merged = merge(one)
        copied = replace(layer, attention=copy.deepcopy(layer.attention).double())
        write(copied, groups, merged)
        key_name = one.key_name(layer.k_norm is not None)
        tried.append((key_name, merged, errors(layer, copied, groups, inputs)))
    # keys and values are merged apart, so that each may come from another method
    key_method, keys, (k_error, _) = min(tried, key=lambda one: one[2][0])
    _, values, (_, v_error) = min(tried, key=lambda one: one[2][1])
    both = [
        Merged(k.key, k.key_maps, v.value, v.value_maps) for k, v in zip(keys, values, strict=True)
    ]
    return Judged(both, key_method, k_error, v_error)


def errors(
    old: Layer, new: Layer, groups: Sequence[Sequence[int]], inputs: Tensor
) -> tuple[float, float]:
    """(k_error, v_error) of `new`, which is `old` with the heads of each group merged, on inputs
    (N, D).

    Over the query heads and over pairs of independent tokens, E(q k - q' k')^2 / E(q k)^2, and over
    tokens E|O v - O' v'|^2 / E|O v|^2: what `relative_errors` is where the projections are all
    there is."""
    # Heads may have moved: query head n of the new layer is `queries[n]` of the old one, whose key
    # and value head is `keys[n]`.
    share = old.heads // old.kv_heads
    kept = torch.tensor([head for group in groups for head in group])
    queries = (kept[:, None] * share + torch.arange(share)).flatten()
    keys, new_keys = queries // share, torch.arange(old.heads) // (old.heads // new.kv_heads)
    # q k - q' k' = (q, q').(k, -k'): of independent tokens, its mean square is the sum over the
    # products of two second moments
    q, k, v = (_Moments(old.head_dim) for _ in range(3))
    for x in inputs.to(old.q.like.device).double().split(512):
        q.add(attended(old, "q", x)[:, queries], attended(new, "q", x))
        k.add(attended(old, "k", x)[:, keys], -attended(new, "k", x)[:, new_keys])
        v.add(attended(old, "v", x)[:, keys], -attended(new, "v", x)[:, new_keys])
    outputs = _Moments(old.head_dim)
    outputs.add(*(o.double().transpose(0, 1) for o in (old.o.by_head[queries], new.o.by_head)))
    return q.shares(k), outputs.shares(v)


class _Moments:
    """Sums of (a, b)(a, b)^T by head, (H, 2d, 2d), over tokens."""

    def __init__(self, head_dim: int):
        self.head_dim = head_dim
        self.total: Tensor | float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """a and b (N, H, d)."""
        both = torch.cat([a, b], dim=-1).transpose(0, 1)
        self.total = self.total + both.mT @ both

    def shares(self, other: _Moments) -> float:
        """E((a, b) . (c, d))^2 over E(a . c)^2, for (a, b) and (c, d) drawn independently."""
        d = self.head_dim
        products = torch.as_tensor(self.total * other.total)
        return float(products.sum().clamp_min(0) / products[:, :d, :d].sum().clamp_min(1e-300))
