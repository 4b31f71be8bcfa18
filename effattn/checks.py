"""Checks of what a call of a backend says, before any work is done. Each raises what is wrong, with
what was got and what is valid.

q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), mask (B, tokens so far) bool."""

from __future__ import annotations

import math
from types import NoneType
from typing import Protocol

import torch
from torch import Tensor

from effattn.errors import Unsupported
from effattn.kernels.flash.dropout import check_rate
from effattn.kernels.latent import Latent
from effattn.positions.bound import Positions
from effattn.states.base import State
from effattn.states.caches import Described
from effattn.states.full import FullState
from effattn.states.sizes import check_sizes


class Checked(Described, Protocol):
    """What the checks read of a backend."""

    @property
    def farthest(self) -> int | None:
        """Where first keys see a query at most; None: where it is."""
        ...

    @property
    def score_rules(self) -> bool:
        """Whether it honours rules that decide scores pair by pair."""
        ...

    def places(self, rule: Positions) -> bool:
        """Whether a method that is not exact honours this rule."""
        ...

    @property
    def extras(self) -> tuple[str, ...]:
        """Which of a call's further arguments it honours."""
        ...


def check_tensors(backend: Checked, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """ValueError for shapes, dtypes or devices of q, k and v that do not fit together, Unsupported
    for a direction that the method does not have."""
    if causal and not backend.traits.causal:
        raise Unsupported(
            f"{backend.name}: causal=True is not possible with this method; valid is causal=False"
        )
    if not causal and not backend.traits.bidirectional:
        raise Unsupported(
            f"{backend.name}: causal=False is not possible with this method; valid is causal=True"
        )
    for which, x in {"q": q, "k": k, "v": v}.items():
        if not isinstance(x, Tensor) or x.ndim != 4 or 0 in x.shape[1:]:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{which}: expected (batch, heads, tokens, head_dim), all of them >= 1, got {got}"
            )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v: expected one device, got {q.device}, {k.device}, {v.device}")
    if q.is_meta:
        raise ValueError(
            "q, k, v: got tensors on the meta device, which hold no numbers; valid are cpu and cuda"
        )
    batch, heads, _, dim = q.shape
    kv_heads, new = k.shape[1:3]
    if k.shape != (batch, kv_heads, new, dim):
        raise ValueError(
            f"k: expected ({batch}, kv_heads, keys, {dim}) to fit q, got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: expected ({batch}, {kv_heads}, {new}, value_dim) to fit k, got {tuple(v.shape)}"
        )
    if heads % kv_heads:
        raise ValueError(f"q: expected a multiple of k's {kv_heads} heads, got {heads} heads")


def check_tensors_once(backend: Checked, q, k, v, causal: bool, before: tuple) -> tuple:
    """`check_tensors`, if what it depends on is not `before`, which it gave the last time."""
    found: tuple = ()
    if type(q) is type(k) is type(v) is Tensor and not torch.compiler.is_compiling():
        found = q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, causal
        found += q.device, k.device, v.device
    if found and found == before:  # steps look alike
        return before
    check_tensors(backend, q, k, v, causal)
    return found or before


def look_of(backend: Checked, q, k, v, causal, state, scale) -> tuple:
    """What the checks of a call depend on that brings new tokens to a state and nothing more,
    but for what the state holds and the rotary rule. Empty where they have to be made."""
    if not isinstance(state, State) or torch.compiler.is_compiling():
        return ()
    if state.real is not None or state.rows is not None or state.static:
        return ()
    if not type(q) is type(k) is type(v) is Tensor or type(scale) not in (float, NoneType):
        return ()
    shape, keys = q.shape, k.shape
    # more queries than new keys: how many tokens the state has would decide
    if len(shape) != 4 or len(keys) != 4 or shape[2] > keys[2]:
        return ()
    kinds = q.dtype, k.dtype, v.dtype, q.device, k.device, v.device
    return shape, keys, v.shape, *kinds, causal, scale, backend.signature


def check_state(backend: Checked, state: State | None, k: Tensor, v: Tensor) -> None:
    """ValueError for a state of another backend, or one that began with other sizes."""
    if state is None:
        return
    if not isinstance(state, State):
        raise ValueError(
            f"state: expected one from {backend.name}'s new_state(), got {type(state).__name__}"
        )
    if state.owner is None:  # made by hand
        own, keep = backend.new_state(), getattr(state, "keep", None)
        needs = getattr(own, "keep", None)
        fits = (
            keep is None or (needs is not None and needs <= keep) if state.packed else keep == needs
        )
        # A state that holds everything serves every method; one of another kind has to be of the
        # backend's own class and size, or packed with a window that is large enough.
        whole = type(state) is FullState
        if not whole and (not fits or not (state.packed or type(state) is type(own))):
            raise ValueError(
                f"state: got a {type(state).__name__} that {backend.signature} cannot use; valid "
                "is one from its new_state()"
            )
    elif state.owner != backend.signature:
        raise ValueError(
            f"state: it belongs to {state.owner}, got a call of {backend.signature}; valid is one "
            "from its new_state()"
        )
    if state.sizes is not None:
        check_sizes(state.sizes, state.seq_len, k, v)


def check_tokens(q: Tensor, k: Tensor, padding_mask: Tensor | None, state: State | None) -> None:
    """ValueError for more queries than keys, and for a mask that is not one of all tokens."""
    batch, _, queries, _ = q.shape
    new, past = k.shape[2], 0 if state is None else state.seq_len
    static = isinstance(past, Tensor)  # a number on the device, which is not asked for
    total = new if static else new + past
    if total < queries:
        raise ValueError(
            f"k: expected at least q's {queries} tokens, got {total} (queries are the last keys)"
        )
    if padding_mask is None:
        return
    if not isinstance(padding_mask, Tensor) or not padding_mask.ndim:
        got = type(padding_mask).__name__
        raise ValueError(
            f"padding_mask: expected a tensor ({batch}, {total}) of torch.bool, got {got}"
        )
    if padding_mask.shape != (batch, padding_mask.shape[-1] if static else total):
        with_past = f" ({total - new} in the state + {new} new)" if state is not None else ""
        raise ValueError(
            f"padding_mask: expected ({batch}, {total}){with_past}, got {tuple(padding_mask.shape)}"
        )
    if padding_mask.dtype != torch.bool or padding_mask.device != q.device:
        got = f"{padding_mask.dtype} on {padding_mask.device}"
        raise ValueError(f"padding_mask: expected torch.bool on {q.device}, got {got}")


def check_rules(scale, rotary) -> None:
    """ValueError for a scale that is no finite number above 0, and for a rotary rule that cannot be
    called.
    """
    # a compiled graph cannot ask what a number is
    if scale is not None and not torch.compiler.is_compiling():
        check_positive("scale", scale)
    if rotary is not None and not callable(rotary):
        raise ValueError(f"rotary: expected a callable rule, got {type(rotary).__name__}")


def check_positions(
    backend: Checked, rule: Positions, causal: bool, state: State | None, mask: Tensor | None
) -> None:
    """Raises Unsupported for a position rule that this method cannot have, or not with packed
    keys.
    """
    if state is not None and (state.packed or state.static):
        # A bias' table is as long as the sequence, and angles may follow its length: neither can be
        # read in place where the length is a tensor or differs by row.
        biased = rule.bias is not None and state.static
        if biased or not rule.turnable(one_length=mask is None and not state.static):
            varies = rule.turns and rule.rotation is not None and rule.rotation.varies
            where = " where rows are padded, or their length is a tensor" if varies else ""
            where = " whose length is a tensor" if biased else where
            keys = "packed keys" if state.packed else "a static cache"
            raise Unsupported(
                f"rotary: {rule.spec!r} cannot go with {keys}{where}; valid is a full cache"
            )
    if rule.causal_only and not causal:
        raise Unsupported(f"rotary: {rule.spec!r} needs causal=True")
    if backend.places(rule):
        return
    if rule.raw_keys and state is not None and not backend.traits.exact:
        raise Unsupported(
            f"rotary: {rule.spec!r} turns old keys anew as a sequence grows, and {backend.name} "
            f"remembers no raw keys, but {backend.traits.state}; valid are exact patterns, or no "
            "state"
        )
    if rule.scores and not backend.score_rules:
        raise Unsupported(
            f"rotary: {rule.spec!r} decides scores pair by pair, which {backend.name} does not "
            "compute; valid are exact patterns (with topk rerope too, clipped within its window)"
        )
    apart = backend.farthest is not None and (rule.raw_keys or rule.scores)
    if apart and not backend.traits.exact:
        raise Unsupported(
            f"rotary: {rule.spec!r}, where {backend.name} counts positions by their place in the "
            "cache; valid are rules that only turn by fixed angles, and logn"
        )
    held = state is not None and (state.packed or state.static)
    if held and apart:
        raise Unsupported(
            f"rotary: {rule.spec!r} with sinks, which it scores apart, cannot go with packed keys "
            "or a static cache; valid are a full cache, or rules that only turn by fixed angles, "
            "and logn"
        )


def check_dropout(backend: Checked, extras: dict, state: State | None) -> None:
    """Takes a rate of 0 out of `extras`. ValueError for what is no rate, Unsupported for a method
    or a state without weights that could be dropped."""
    if "dropout" not in extras:
        return
    check_rate(extras["dropout"])
    if not extras["dropout"]:
        del extras["dropout"]
    elif "dropout" not in backend.extras:
        raise Unsupported(
            f"dropout: {backend.name} has no weights of pairs that are dropped one by one; valid "
            "is 0.0, or an exact pattern"
        )
    elif state is not None and state.packed:
        raise Unsupported(
            f"dropout: got {extras['dropout']} and packed keys, which are attended to in their "
            "codes; valid is a full cache, or none"
        )


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


def check_extras(
    q: Tensor,
    softcap=None,
    sink_logits=None,
    global_qkv=None,
    global_mask=None,
    latent=None,
    dropout=None,
    prefix=None,
) -> None:
    """ValueError for extras that do not fit q; what their shapes have to be beyond that, a backend
    checks.
    """
    if softcap is not None and not torch.compiler.is_compiling():
        check_positive("softcap", softcap)
    if sink_logits is not None:
        found = sink_logits if isinstance(sink_logits, Tensor) else None
        if (
            found is None
            or found.shape != q.shape[1:2]
            or not found.is_floating_point()
            or found.device != q.device
        ):
            valid = f"one float for each of q's heads, ({q.shape[1]},) on {q.device}"
            raise ValueError(f"sink_logits: expected {valid}, got {_described(sink_logits)}")
    if global_qkv is not None:
        three = isinstance(global_qkv, (tuple, list)) and len(global_qkv) == 3
        if not three or not all(isinstance(x, Tensor) for x in global_qkv):
            raise ValueError(
                f"global_qkv: expected three tensors, q, k and v, got {_described(global_qkv)}"
            )
        if any(x.device != q.device for x in global_qkv):
            got = ", ".join(str(x.device) for x in global_qkv)
            raise ValueError(f"global_qkv: expected tensors on {q.device}, got {got}")
    if global_mask is not None:
        valid = f"torch.bool ({q.shape[0]}, {q.shape[2]}) on {q.device}, of a whole sequence"
        fits = isinstance(global_mask, Tensor) and global_mask.shape == (q.shape[0], q.shape[2])
        if not fits or global_mask.dtype != torch.bool or global_mask.device != q.device:
            raise ValueError(f"global_mask: expected {valid}, got {_described(global_mask)}")
    if latent is not None and not isinstance(latent, Latent):
        raise ValueError(
            f"latent: expected an effattn.kernels.latent.Latent, got {_described(latent)}"
        )


def _described(x) -> str:
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {x.dtype} on {x.device}"
    if isinstance(x, (tuple, list)):
        return f"{len(x)} of {', '.join(sorted({type(y).__name__ for y in x}))}"
    return type(x).__name__
