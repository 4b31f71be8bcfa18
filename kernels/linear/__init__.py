"""Linear attention: sums instead of scores. Checks nothing but the implementation, chooses, runs
it.

    # causal; memory holds all of k and v
    out, memory = attention(q, k, v, "elu")
    # goes on from a memory
    out, memory = attention(q, k, v, "favor", directions=W, scale=D**-0.5, memory=memory)
    # only the sums
    memory = fold(k, v, "elu", memory=memory)

Forward and backward, also through the memory. `features.py` has the maps, `reference.py` the
definition."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from .features import MAPS

__all__ = [
    "IMPLEMENTATIONS",
    "MAPS",
    "Memory",
    "attention",
    "choose",
    "factors_of",
    "fold",
    "width",
]


class Memory(NamedTuple):
    """All that is kept of the tokens so far, fp32 (fp64 for fp64 inputs), per key/value head.

    sums (B, Hkv, F, Dv) = sum_j w_j phi(k_j) v_j and norms (B, Hkv, F) = sum_j w_j phi(k_j) (None:
    not normalised), with w_j = decay^(last - j), or for maps with log weights exp(mu_j - top), top
    (B, Hkv) the highest mu so far."""

    sums: Tensor
    norms: Tensor | None
    top: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all of its tensors."""
        return sum(x.nbytes for x in self if x is not None)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str = "elu",
    *,
    directions: Tensor | None = None,
    mask: Tensor | None = None,
    decay: Tensor | None = None,
    normalize: bool = True,
    causal: bool = True,
    scale: float = 1.0,
    memory: Memory | None = None,
    keep: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Memory | None]:
    """o_t = sum_j w_tj phi(q_t).phi(k_j) v_j, over the same without v_j if `normalize`; 0 where
    that is 0.

    q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) of one float dtype and device, Hq a
    multiple of Hkv, not checked here; queries are the last keys. feature_map: a name in `MAPS`; the
    Performer ones need directions (F, D) and estimate exp(scale q.k), for the others scale
    multiplies the output if it is not normalised. mask (B, Tk) bool: real keys. decay (Hkv,) in (0,
    1], causal only. memory: what came before k and v. Returns out (B, Hq, Tq, Dv) in q's dtype, and
    with `keep` the memory after k and v."""
    if choose(impl, q.device) == "triton":
        from .triton_impl import attention as run
    else:
        from .torch_impl import attention as run
    out, *after = run(
        q,
        k,
        v,
        feature_map,
        directions=directions,
        mask=mask,
        decay=decay,
        normalize=normalize,
        causal=causal,
        factors=factors_of(feature_map, scale),
        gain=1.0 if normalize else scale,
        memory=memory,
        keep=keep,
    )
    return out.to(q.dtype), Memory(*after) if keep else None


def fold(
    k: Tensor,
    v: Tensor,
    feature_map: str = "elu",
    *,
    directions: Tensor | None = None,
    mask: Tensor | None = None,
    decay: Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    memory: Memory | None = None,
    impl: str = "auto",
) -> Memory:
    """The memory after k and v, as `attention` would return it."""
    if choose(impl, k.device) == "triton":
        from .triton_impl import attention as run
    else:
        from .torch_impl import attention as run
    _, *after = run(
        None,
        k,
        v,
        feature_map,
        directions=directions,
        mask=mask,
        decay=decay,
        normalize=normalize,
        causal=True,
        factors=(1.0, factors_of(feature_map, scale)[1]),
        gain=1.0,
        memory=memory,
        keep=True,
    )
    return Memory(*after)


def factors_of(feature_map: str, scale: float) -> tuple[float, float]:
    """What q and k are multiplied by before the feature map."""
    if not MAPS[feature_map].directed:
        return 1.0, 1.0
    root = abs(scale) ** 0.5
    return (root if scale >= 0 else -root), root


def width(feature_map: str, head_dim: int, directions: int = 0) -> int:
    """F, the number of features."""
    return directions if MAPS[feature_map].directed else head_dim
