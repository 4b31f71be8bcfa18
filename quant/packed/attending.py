"""How a `PackedState` is read: attention over packed keys and values, without unpacking them.

Up to 16 queries go to `effattn.kernels.decode.packed`, which reads packed bytes and full precision
in one launch. The queries of a longer call see their own tokens by `effattn.kernels.flash` and the
past by the packed kernel, and both are merged by log-sum-exp. A call needs memory for its own
tokens and for tiles, never for the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effattn.errors import Unsupported
from effattn.kernels import flash
from effattn.kernels.decode import MOST_QUERIES, packed
from effattn.kernels.decode.packed import PackedCache
from effattn.kernels.flash.pattern import Layout, Pattern
from effattn.kernels.flash.rules import Far
from effattn.kernels.merge import in_order, merge
from effattn.kernels.pack import Codes, Pages
from effattn.quant.rotation import hadamard

if TYPE_CHECKING:
    from effattn.interface import Call
    from effattn.quant.packed.state import New, PackedState
    from effattn.quant.packed.static import StaticState

PAGE = 2**21  # numbers of one packed tensor on a CPU: what a cache that grows has to copy at most
FEWEST = 2048  # tokens of one, whatever their size
LARGE_PAGE = 32768  # tokens of one on a GPU, where one launch should have work for all of it
BLOCK = (
    256  # queries of a long call that are merged with what they see of the cache at once, on a CPU
)


def attend(
    state: PackedState, new: New, q: Tensor, pattern: Pattern, call: Call, impl: str, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of q (B, Hq, T, D) over what `state` holds and the T new tokens, which it holds
    afterwards, and the log-sum-exp (B, Hq, T) if it is needed. With `call.turn`, keys are held
    raw."""
    check(state, new, q, call, impl)
    rotate, tokens = state.format.rotate, q.shape[2]
    last = min(state.candidates, tokens - 1)
    floor = state.border(new.end - last)
    q = hadamard(q) if "k" in rotate else q
    parts = []
    for low, high in _pieces(state, new, last):
        run = _few if high - low <= MOST_QUERIES else _many
        parts.append(
            run(
                state,
                new.cut(low, high),
                q[:, :, low:high],
                pattern,
                _cut(call, low, high),
                impl,
                need_lse,
            )
        )
        state.settle(new, min(floor, state.border(state.total)))
    out, lse = in_order(parts)
    return (hadamard(out) if "v" in rotate else out), lse


def check(state: PackedState | StaticState, new: New, q: Tensor, call: Call, impl: str) -> None:
    """Raises for what cannot be computed with packed keys, before anything has changed."""
    where = f"cache: {state.format}"
    if q.shape[2] != new.k.shape[2]:
        raise ValueError(
            f"{where}: q: got {q.shape[2]} tokens, valid are as many as in k, {new.k.shape[2]}"
        )
    if impl == "reference":
        raise Unsupported(
            f"{where}: impl: got 'reference', valid with a packed cache are 'auto', 'torch' and "
            "'triton'"
        )
    if not call.causal:
        raise Unsupported(
            f"{where}: causal=False, valid is causal=True: what is remembered is the past"
        )
    if "k" in state.format.rotate and call.turn is not None:
        raise Unsupported(
            f"{where}: rotate='k' mixes a key's dimensions after its rotary turn, and here keys "
            "are kept before it; "
            "valid is rotate='v'"
        )


def _pieces(state: PackedState, new: New, last: int) -> Iterator[tuple[int, int]]:
    """Runs of new tokens that see the same ones packed: all at once, but for the `last`, which come
    one by one.
    """
    tokens = new.k.shape[2]
    low = tokens - last
    yield 0, low
    while low < tokens:
        high, border = low + 1, state.border(new.first + low)
        while high < min(tokens, low + MOST_QUERIES) and state.border(new.first + high) == border:
            high += 1
        yield low, high
        low = high


def _cut(call: Call, low: int, high: int) -> Call:
    """The call of its queries [low, high)."""
    turn, q_first = call.turn, call.q_first
    if turn is not None and turn.q_far is not None:
        turn = replace(turn, q_far=turn.q_far[:, :, low:high])
    return replace(call, turn=turn, q_first=None if q_first is None else q_first[:, :, low:high])


def _few(
    state: PackedState, new: New, q: Tensor, pattern: Pattern, call: Call, impl: str, need_lse: bool
):
    """Takes the tokens in, in full precision, and reads everything."""
    state.take(new)
    return _read(state, new, q, state.total, pattern, call, impl, need_lse)


def _many(
    state: PackedState, new: New, q: Tensor, pattern: Pattern, call: Call, impl: str, need_lse: bool
):
    """The new tokens among themselves, what is held, and both together. Then they are taken in."""
    k, far = new.k, {}
    if call.turn is not None:
        at = torch.arange(new.first, new.end, device=k.device)[None]
        at = (at if new.start is None else at - new.start[:, None]).clamp(min=0)
        k = call.turn.keys(new.k, at)
        if call.turn.window is not None:
            far = {
                "far": Far(call.turn.q_far, call.turn.keys(new.k, at, far=True), call.turn.window)
            }
    out = among(new, k, q, pattern, call, impl, **far)
    if new.first:
        block = q.shape[2] if flash.choose(impl, q.device) == "triton" else BLOCK
        for low in range(0, q.shape[2], block):
            high = min(low + block, q.shape[2])
            some = slice(None), slice(None), slice(low, high)
            seen = _read(
                state, new, q[some], new.first + high, pattern, _cut(call, low, high), impl, True
            )
            out[0][some], out[1][some] = merge([(out[0][some], out[1][some]), seen])
    state.absorb(new)
    return out


def among(
    new: New, k: Tensor, q: Tensor, pattern: Pattern, call: Call, impl: str, **far
) -> tuple[Tensor, Tensor]:
    """Attention of the new tokens over themselves. k: their keys as they are to be scored."""
    real = None if new.mask is None else new.mask[:, new.first : new.end]
    layout = Layout(tail=new.first, start=new.start, mask=real)
    return flash.attention(
        q,
        k,
        new.v,
        pattern,
        layout,
        causal=True,
        scale=call.scale,
        softcap=call.softcap,
        q_first=call.q_first,
        bias=call.bias,
        impl=impl,
        lse=True,
        **far,
    )


def _read(
    state: PackedState,
    new: New,
    q: Tensor,
    total: int,
    pattern: Pattern,
    call: Call,
    impl: str,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of q, the last of `total` tokens, over what the state holds."""
    caches = list(_caches(state, new, total, together=flash.choose(impl, q.device) == "torch"))
    parts = []
    for cache in caches:
        first = min(pattern.first, cache.slots)
        part = packed.attention(
            q,
            cache,
            replace(pattern, first=first),
            causal=True,
            scale=call.scale,
            softcap=call.softcap,
            q_first=call.q_first if first else None,
            turn=call.turn,
            bias=call.bias,
            impl=impl,
            lse=need_lse or len(caches) > 1,
        )
        parts.append(part if isinstance(part, tuple) else (part, None))
    return parts[0] if len(parts) == 1 else merge(parts)


def _caches(state: PackedState, new: New, total: int, together: bool) -> Iterator[PackedCache]:
    """What is held: all pages together, or page by page, the first tokens beside the first, the
    rest beside the last."""
    rest = [x[:, :, state.stored - state.begin :] for x in state.rest]
    runs = list(state.runs()) or [(*_nothing(state), state.format.first)]
    if together and len(runs) > 1:
        runs = [(Pages([k for k, _, _ in runs]), Pages([v for _, v, _ in runs]), runs[0][2])]
    for index, (k, v, where) in enumerate(runs):
        is_first, is_last = index == 0, index == len(runs) - 1
        numbers = where if isinstance(where, Tensor) else None
        k_rest, v_rest = rest if is_last else [x[:, :, :0] for x in rest]
        k_first, v_first = state.firsts if is_first and state.firsts else (None, None)
        mask = None
        if new.mask is not None:
            mask = _mask(
                state,
                new,
                0 if k_first is None else k_first.shape[2],
                where,
                k.tokens,
                k_rest.shape[2],
            )
        newest = total == state.total and is_last
        yield PackedCache(
            k,
            v,
            k_rest,
            v_rest,
            total,
            k_first,
            v_first,
            packed_from=0 if numbers is not None else where,
            packed_numbers=numbers,
            start=new.start,
            mask=mask,
            rest_numbers=None
            if newest
            else torch.arange(state.stored, state.stored + k_rest.shape[2], device=k.device),
        )


def _mask(
    state: PackedState, new: New, firsts: int, where: int | Tensor, tokens: int, rest: int
) -> Tensor:
    """(B, firsts + tokens + rest) bool: which of one `PackedCache`'s keys are real, there, and held
    nowhere else.
    """
    device, start = new.k.device, new.start[:, None]
    if isinstance(where, Tensor):
        number, real = where, new.mask[:, where.clamp(min=0)]
    else:
        number, real = (
            torch.arange(where, where + tokens, device=device),
            new.mask[:, where : where + tokens],
        )
    newest = torch.arange(state.stored, state.stored + rest, device=device)
    number = torch.cat([number, newest])
    real = torch.cat([real, new.mask[:, state.stored : state.stored + rest]], dim=1)
    # the kernel skips those only where it is given the first tokens
    if state.firsts and not firsts:
        real = real & (number - start >= state.format.first)
    there = start + torch.arange(firsts, device=device) < state.total
    return torch.cat([there, real], dim=1)


def _nothing(state: PackedState) -> tuple[Codes, Codes]:
    """Packed keys and values of no tokens."""
    codings = (state.format.k, state.format.v)
    return tuple(
        Codes.empty(coding, *x.shape[:2], 0, x.shape[3], x.device)
        for coding, x in zip(codings, state.rest, strict=True)
    )
