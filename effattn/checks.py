"""Checks of what a call of a backend says beside q, k and v: one line each, before any work is done."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_positive(argument: str, value) -> None:
    """ValueError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise ValueError(f"{argument}: expected a number, got {type(value).__name__}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{argument}: expected one number, got a tensor {tuple(value.shape)}")
    if not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number, got {float(value)}")
    if not value > 0:
        raise ValueError(f"{argument}: expected a number above 0, got {float(value)}")


def check_extras(q: Tensor, softcap=None, sink_logits=None, global_qkv=None) -> None:
    """ValueError for extras that do not fit q; what their shapes have to be beyond that, a backend checks."""
    if softcap is not None and not torch.compiler.is_compiling():
        check_positive("softcap", softcap)
    if sink_logits is not None:
        found = sink_logits if isinstance(sink_logits, Tensor) else None
        if found is None or found.shape != q.shape[1:2] or not found.is_floating_point() or found.device != q.device:
            valid = f"one float for each of q's heads, ({q.shape[1]},) on {q.device}"
            raise ValueError(f"sink_logits: expected {valid}, got {_described(sink_logits)}")
    if global_qkv is not None:
        three = isinstance(global_qkv, (tuple, list)) and len(global_qkv) == 3
        if not three or not all(isinstance(x, Tensor) for x in global_qkv):
            raise ValueError(f"global_qkv: expected three tensors, q, k and v, got {_described(global_qkv)}")
        if any(x.device != q.device for x in global_qkv):
            got = ", ".join(str(x.device) for x in global_qkv)
            raise ValueError(f"global_qkv: expected tensors on {q.device}, got {got}")


def _described(x) -> str:
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {x.dtype} on {x.device}"
    if isinstance(x, (tuple, list)):
        return f"{len(x)} of {', '.join(sorted({type(y).__name__ for y in x}))}"
    return type(x).__name__
