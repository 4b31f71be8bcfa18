"""Softmax attention: checks the implementation's name, chooses one, runs it. Shapes are the caller's to validate."""

from __future__ import annotations

from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "reference")


def choose(impl: str = "auto") -> str:
    """The implementation that `impl` runs: "torch" or "reference"; "auto" is "torch", on every device.

    Raises NotImplementedError for "triton", ValueError for any other name.
    """
    if impl == "triton":
        raise NotImplementedError(
            f"no Triton kernel for dense in this version; available: {', '.join(IMPLEMENTATIONS)}"
        )
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, valid are {', '.join(map(repr, IMPLEMENTATIONS))}")
    return "torch" if impl == "auto" else impl


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    padding_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(scale q k^T) v over the keys each query may see.

    q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) of one float dtype and device, Hq a multiple of Hkv;
    padding_mask (B, Tk) bool, True = a real token; scale defaults to D^-0.5. Returns (B, Hq, Tq, Dv) in q's dtype.
    """
    if choose(impl) == "reference":
        from .reference import attention as run
    else:
        from .torch_impl import attention as run
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run(q, k, v, causal=causal, padding_mask=padding_mask, scale=scale)
