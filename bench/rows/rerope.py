"""ReRoPE in the kernels: whole sequences against our own dense attention and against both scores
everywhere, and decoding from keys that are stored raw against decoding from rotated ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import effattn
from bench.attention import Attention, length_name
from bench.case import Contender, Ratio, Target
from bench.peers import find
from effattn.kernels import decode, flash
from effattn.kernels.decode import Turn
from effattn.kernels.decode.turn import rotate
from effattn.kernels.flash import Far
from effattn.kernels.flash.reference import attention as reference

FORWARD, TRAINING, DECODE = "forward", "forward+backward", "decode"
TITLE = "ReRoPE"
WINDOWS = (256, 512)
SLOW = 16.0  # of Leaky ReRoPE
ROWS = 256  # queries at a time, of both scores everywhere
CHECKED = 1024  # tokens at which answers are checked, all of them
DENSE, ROTATED = "effattn dense", "effattn rotated keys"
EVERYWHERE = "both scores everywhere, window 512"
GPU = {"heads": 32, "kv_heads": 8, "dim": 128}
SOURCE = "ReRoPE: at most 1.35x our own dense attention on a CPU, 1.15x on a GPU"


@dataclass(frozen=True)
class Pairs(Attention):
    """Inputs are q, k, v and then q and k of the far pairs; for decoding k is raw, and then come
    the query for far keys and the rotated keys."""

    def inputs(self, tokens, device, seed=0):
        q, k, v = super().inputs(tokens, device, seed)
        if self.what == DECODE:
            angle = torch.arange(tokens, device=device)[:, None] * inv_freq(self.dim, device)
            return [q, k, v, q.flip(-1), rotate(k, angle.cos(), angle.sin())]
        far = super().inputs(tokens, device, seed + 1000)
        return [q, k, v, *far[:2]]

    def answers(self, call, inputs):
        if not self.training:
            return super(Attention, self).answers(call, inputs)
        out = call(*inputs)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)
        names = ("dq", "dk", "dv", "dq_far", "dk_far")
        return {
            "output": out,
            **{name: x for name, x in zip(names, grads, strict=True) if x is not None},
        }


def inv_freq(dim: int, device: torch.device) -> Tensor:
    """RoPE's frequencies (D / 2,), base 10000."""
    return 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)


# Contenders
# -------------------------------------------------------------------------------------------------


def _contender(
    name: str, call: Callable, truth: Callable | None, ours: bool = True, **settings
) -> Contender:
    """truth: the same call by the definition."""

    def right(case, inputs, _):
        leaves = [x.detach().double().requires_grad_(case.training) for x in inputs]
        return case.answers(truth, leaves)

    settings = {"check_tokens": CHECKED, **settings}
    return Contender(
        name, lambda case, inputs: call, truth and right, ours=ours, spec="dense", **settings
    )


def _dense(**settings) -> Contender:
    def run(q, k, v, *far):
        return flash.attention(q, k, v)

    return _contender(DENSE, run, partial(_defined, None), **settings)


def _rerope(window: int, **settings) -> Contender:
    def run(q, k, v, q_far, k_far):
        return flash.attention(q, k, v, far=Far(q_far, k_far, window))

    return _contender(
        f"effattn rerope(window={window})", run, partial(_defined, window), **settings
    )


def _everywhere(window: int) -> Contender:
    """Both products for all pairs, as ReRoPE's own code has them, but for a few queries at a
    time.
    """

    def run(q, k, v, q_far, k_far):
        parts = []
        for a in range(0, q.shape[2], ROWS):
            b = min(a + ROWS, q.shape[2])
            distance = torch.arange(a, b, device=q.device)[:, None] - torch.arange(
                b, device=q.device
            )
            near, far = (x[:, :, a:b] @ y[:, :, :b].mT for x, y in ((q, k), (q_far, k_far)))
            scores = torch.where(distance < window, near, far) * q.shape[-1] ** -0.5
            weights = torch.softmax(scores.masked_fill_(distance < 0, -math.inf), dim=-1)
            parts.append(weights @ v[:, :, :b])
        return torch.cat(parts, dim=2)

    return _contender(EVERYWHERE, run, partial(_defined, window), ours=False)


def _defined(window, q, k, v, q_far, k_far):
    i = torch.arange(q.shape[2], device=q.device)
    distance = i[:, None] - i
    far = Far(q_far, k_far, window) if window else None
    return reference(
        q, k, v, distance >= 0, scale=q.shape[-1] ** -0.5, far=far, distance=distance[None]
    )[0]


def _sdpa(who: str) -> Contender:
    def build(case, inputs):
        call = find(who)(effattn.backend("dense").to(inputs[0].device), case, inputs[:3])
        return lambda q, k, v, *far: call(q, k, v)

    return Contender(f"{who} dense", build, spec="dense")


def _decoding(
    name: str, window: int | None = None, slow: float = math.inf, raw: bool = True
) -> Contender:
    """One query over keys that are rotated when they are read, or have been (not raw)."""

    def run(q, k, v, q_far, rotated):
        if not raw:
            return decode.attention(q, rotated, v)
        turn = Turn(
            inv_freq(q.shape[-1], q.device),
            window=window,
            slow=slow,
            q_far=q_far if window else None,
        )
        return decode.attention(q, k, v, turn=turn)

    def truth(q, k, v, q_far, rotated):
        j = torch.arange(k.shape[2], device=k.device)
        angle = j[:, None] / slow * inv_freq(q.shape[-1], q.device).double()
        far = Far(q_far, rotate(k, angle.cos(), angle.sin()), window) if window else None
        distance = (k.shape[2] - 1 - j)[None, None]
        return reference(
            q, rotated, v, distance >= 0, scale=q.shape[-1] ** -0.5, far=far, distance=distance
        )[0]

    return _contender(name, run, truth)


# Rows
# -------------------------------------------------------------------------------------------------


def _case(what: str, dtype: str, tokens: int, contenders=(), **settings) -> Pairs:
    return Pairs(what, dtype, tokens, tuple(contenders), **{"title": TITLE, **settings})


def _growth(lengths) -> Pairs:
    raced = [_rerope(512, tokens=tokens) for tokens in lengths]
    named = [Contender(**{**vars(one), "name": length_name(one.tokens)}) for one in raced]
    return _case(FORWARD, "float32", max(lengths), named, title=f"growth {TITLE}", declared=(2, 1))


def cases(device, quick):
    """ReRoPE beside our dense attention, and beside both scores everywhere."""
    if device == "cuda":
        yield from _gpu(quick)
        return
    ours = [_dense(), *map(_rerope, WINDOWS)]
    for tokens in (2048,) if quick else (2048, 8192):
        yield _case(FORWARD, "float32", tokens, [*ours, _everywhere(512)])
    yield _case(TRAINING, "float32", 1024 if quick else 4096, ours)
    yield _growth((512, 1024, 2048) if quick else (2048, 4096, 8192))
    for kv_heads in (8, 2):
        yield _case(DECODE, "float32", 4096, _decoders(), batch=4, kv_heads=kv_heads)


def _gpu(quick):
    dense = [_sdpa(f"SDPA-{name}") for name in ("flash", "cudnn", "efficient")]
    for tokens in (4096,) if quick else (16384, 65536):
        for what in (FORWARD, TRAINING):
            yield _case(what, "bfloat16", tokens, [*dense, _dense(), *map(_rerope, WINDOWS)], **GPU)
    for batch, tokens in ((16, 4096),) if quick else ((16, 4096), (1, 65536)):
        yield _case(DECODE, "bfloat16", tokens, _decoders(), batch=batch, **GPU)


def _decoders() -> list[Contender]:
    return [
        _decoding(ROTATED, raw=False),
        *(_decoding(f"effattn rerope(window={window})", window) for window in WINDOWS),
        _decoding(f"effattn leaky_rerope(window=512, k={SLOW:g})", 512, SLOW),
        _decoding("effattn rope, raw keys"),
    ]


def targets(device):
    """How much slower than dense attention it may be."""
    if device == "cuda":
        for tokens in (16384, 65536):
            name = _case(FORWARD, "bfloat16", tokens, **GPU).name
            yield _slower(
                f"ReRoPE against our own dense attention, T={tokens}", name, 512, DENSE, 1.15
            )
            yield _slower(
                f"ReRoPE against SDPA's flash kernel, T={tokens}",
                name,
                512,
                "SDPA-flash dense",
                1.3,
            )
        return
    name = _case(FORWARD, "float32", 8192).name
    for window in WINDOWS:
        said = f"ReRoPE, window {window}, against our own dense attention, T=8192"
        yield _slower(said, name, window, DENSE, 1.35)
    few, many = ((_growth((2048, 4096, 8192)).name, length_name(tokens)) for tokens in (2048, 8192))
    yield Target(
        "ReRoPE: peak memory, 8192 over 2048 tokens",
        Ratio(many, few, "peak_bytes"),
        SOURCE,
        most=4.6,
    )
    for kv_heads in (8, 2):
        name = _case(DECODE, "float32", 4096, batch=4, kv_heads=kv_heads).name
        said = (
            f"decoding with ReRoPE, window 256, 4096 raw keys, {kv_heads} K/V heads, against "
            "rotated keys"
        )
        yield _slower(said, name, 256, ROTATED, 1.2)


def _slower(said: str, name: str, window: int, than: str, most: float) -> Target:
    return Target(
        said, Ratio((name, f"effattn rerope(window={window})"), (name, than)), SOURCE, most=most
    )
