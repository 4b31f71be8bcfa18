"""Exact patterns on random calls, against the definitions written once more: plain masked softmax
in fp64.

A case is its seed: shapes, groups of heads, where the numbers lie, padding on the left, on the
right and in the middle, fewer queries than keys, scale, soft cap, sink logits, dtype, and what the
pattern's options are. 200 cases run by default and 2,000 with `pytest -m slow`; a failure prints
its seed, for `run(Case.of(seed), "torch")`."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import effattn
from effattn.conformance.layouts import LAYOUTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# one rounding of the result, about
SLACK = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Relative errors of gradients that are nothing to a step of training, as in `effattn.conformance`.
GRADIENTS = {torch.float32: 0.005, torch.float16: 0.005, torch.bfloat16: 0.032}
KINDS = ("dense", "block", "sliding", "longformer", "strided", "fixed", "longnet", "s2")
CAUSAL_ONLY = ("strided", "fixed")


@dataclass(frozen=True)
class Case:
    seed: int
    kind: str
    options: dict
    causal: bool
    # batch, K/V heads, group, queries, keys, head size, value size
    sizes: tuple[int, int, int, int, int, int, int]
    layouts: tuple[int, int, int, int]  # of q, k, v and the output's gradient; -1: the usual one
    padding: str
    scale: float | None
    softcap: float | None
    sinks: bool  # sink logits are passed
    dtype: torch.dtype

    @classmethod
    def of(cls, seed: int, small: bool = False) -> Case:
        draw = random.Random(seed)
        kind = draw.choice(KINDS)
        causal = kind in CAUSAL_ONLY or draw.random() < 0.6
        keys = draw.choice([1, 2, 5, 9] if small else [1, 2, 3, 7, 16, 17, 40, 65, 100, 150, 300])
        queries = keys if draw.random() < 0.6 else draw.randint(1, keys)
        dim = draw.choice([3, 16] if small else [1, 3, 8, 16, 32, 33, 64, 80])
        value_dim = dim if draw.random() < 0.7 else draw.choice([1, 4, 24])
        heads = draw.choice([1, 2] if small else [1, 2, 3])
        return cls(
            seed=seed,
            kind=kind,
            options=options_of(kind, causal, keys, draw),
            causal=causal,
            sizes=(
                draw.choice([1, 2, 3]),
                heads,
                draw.choice([1, 2, 3]),
                queries,
                keys,
                dim,
                value_dim,
            ),
            layouts=tuple(draw.choice([-1, -1, *range(len(LAYOUTS))]) for _ in range(4)),
            padding=draw.choice(["none", "none", "left", "right", "middle", "anywhere"]),
            scale=draw.choice([None, None, 0.3, 1.0]),
            softcap=draw.choice([None, None, 5.0]),
            sinks=draw.random() < 0.2,
            dtype=draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        )


def options_of(kind: str, causal: bool, keys: int, draw: random.Random) -> dict:
    size = draw.randint(1, max(1, keys + 2)) if draw.random() < 0.3 else draw.randint(1, 9)
    odd = size if causal else size | 1
    if kind == "block":
        return {"block": size, "look_back": draw.choice([0, 0, 1, 2])}
    if kind == "sliding":
        sinks = draw.choice([0, 0, 1, 3]) if causal else 0
        return {
            "window": odd,
            "sinks": sinks,
            "dilation": 1 if sinks else draw.choice([1, 1, 2, 3]),
        }
    if kind == "longformer":
        return {"window": odd, "global_tokens": draw.choice([1, 3, [0, 2], [1, 5]])}
    if kind == "strided":
        return {"stride": size}
    if kind == "fixed":
        return {"stride": size, "summary": draw.randint(1, size)}
    if kind == "longnet":
        return draw.choice(
            [
                {"segments": [4, 12], "dilations": [1, 3]},
                {"segments": [8], "dilations": [1]},
                {"segments": [6, 6, 24], "dilations": [2, 1, 4]},
            ]
        )
    return {"block": size + size % 2} if kind == "s2" else {}


# The definitions
# -------------------------------------------------------------------------------------------------


def counts(case: Case, i: Tensor, j: Tensor, h: Tensor, heads: int) -> Tensor:
    """How often the query at position i of head h sees the key at j: the table of the design, and
    nothing of the library's."""
    see = {
        "dense": lambda: torch.ones_like(i - j),
        "block": lambda block, look_back: (
            (i // block - look_back <= j // block) & (j // block <= i // block)
        ),
        "sliding": lambda window, sinks, dilation: (
            sliding(case.causal, i - j, window, dilation) | (j < sinks)
        ),
        "longformer": lambda window, global_tokens: (
            sliding(case.causal, i - j, window, 1)
            | listed(j, global_tokens)
            | listed(i, global_tokens)
        ),
        "strided": lambda stride: (i - j < stride) | ((i - j) % stride == 0),
        "fixed": lambda stride, summary: (
            (i // stride == j // stride) | (stride - 1 - j % stride < summary)
        ),
        "longnet": lambda segments, dilations: sum(
            ((i // w == j // w) & ((i % w - h) % r == 0) & ((j % w - h) % r == 0)).int()
            for w, r in zip(segments, dilations, strict=True)
        ),
        "s2": lambda block: torch.where(
            h < heads // 2,
            i // block == j // block,
            (i + block // 2) // block == (j + block // 2) // block,
        ),
    }[case.kind](**case.options)
    return see * ((i >= j) | (not case.causal))


def sliding(causal: bool, distance: Tensor, window: int, dilation: int) -> Tensor:
    steps = torch.where(distance % dilation == 0, distance // dilation, window)
    return (steps >= 0) & (steps < window) if causal else steps.abs() <= (window - 1) // 2


def listed(position: Tensor, tokens: int | list[int]) -> Tensor:
    return torch.isin(
        position, torch.tensor(list(range(tokens)) if isinstance(tokens, int) else tokens).long()
    )


def oracle(
    case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None
) -> Tensor:
    """Positions count a row's real tokens. A query that is padding, or sees nothing, gives 0."""
    batch, heads, queries, dim = q.shape
    group, keys = heads // k.shape[1], k.shape[2]
    place = mask.long().cumsum(dim=1) - 1
    i, j = place[:, None, keys - queries :, None], place[:, None, None, :]
    seen = counts(case, i, j, torch.arange(heads)[:, None, None], heads) * (
        mask[:, None, None, :] & mask[:, None, keys - queries :, None]
    )
    seen = seen.expand(batch, heads, queries, keys).to(q.dtype)
    scores = (
        q @ k.repeat_interleave(group, dim=1).mT * (dim**-0.5 if case.scale is None else case.scale)
    )
    scores = scores if case.softcap is None else case.softcap * torch.tanh(scores / case.softcap)
    scores = torch.where(
        seen > 0,
        scores + seen.clamp(min=1).log(),
        -torch.inf,
    )
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.to(q.dtype)[None, :, None, None].expand(batch, -1, queries, 1)], dim=-1
        )
    blind = (seen == 0).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1)[..., :keys].masked_fill(
        blind, 0.0
    )
    return weights @ v.repeat_interleave(group, dim=1)


# One case
# -------------------------------------------------------------------------------------------------


def padding_of(case: Case, generator: torch.Generator) -> Tensor:
    """(B, Tk) bool, at least one real token a row."""
    batch, keys = case.sizes[0], case.sizes[4]
    mask = torch.ones(batch, keys, dtype=torch.bool)
    for row in range(batch):
        low, high = sorted(torch.randint(0, keys + 1, (2,), generator=generator).tolist())
        hidden = {
            "none": slice(0),
            "left": slice(0, low),
            "right": slice(high, keys),
            "middle": slice(max(low, 1), high),
            "anywhere": torch.rand(keys, generator=generator) < 0.4,
        }[case.padding]
        mask[row, hidden] = False
        if not mask[row].any():
            mask[row, low % keys] = True
    return mask


def run(case: Case, impl: str) -> None:
    """AssertionError where output or gradients are further from the oracle than twice plain torch
    is, in the same dtype (gradients: or than `GRADIENTS`)."""
    batch, kv_heads, group, queries, keys, dim, value_dim = case.sizes
    generator = torch.Generator().manual_seed(case.seed)
    shapes = (kv_heads * group, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)
    drawn = [
        torch.randn(batch, *shape, generator=generator)
        for shape in (*shapes, (*shapes[0][:2], value_dim))
    ]
    mask = padding_of(case, generator)
    sinks = (
        torch.randn(kv_heads * group, generator=generator)
        if case.sinks and case.kind != "longformer"
        else None
    )
    given = [x.to(case.dtype) for x in drawn]
    given = [x if at < 0 else LAYOUTS[at](x) for at, x in zip(case.layouts, given, strict=True)]
    real = mask[:, None, -queries:, None]
    given[3] = given[3] * real

    attn = effattn.backend(case.kind, **case.options, impl=impl)
    extras = {"softcap": case.softcap} if case.softcap is not None else {}
    extras |= {"sink_logits": sinks.to(DEVICE)} if sinks is not None else {}
    padding = {} if case.padding == "none" else {"padding_mask": mask.to(DEVICE)}

    def ours(q, k, v):
        moved = (x if DEVICE == "cpu" else x.to(DEVICE) for x in (q, k, v))
        return attn(
            *moved,
            causal=case.causal,
            scale=case.scale,
            **padding,
            **extras,
        ).cpu()

    found = {}
    for name, call, dtype in (
        ("ours", ours, case.dtype),
        ("truth", lambda *x: oracle(case, *x, mask, sinks), torch.float64),
        ("plain", lambda *x: oracle(case, *x, mask, sinks), case.dtype),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given[:3]]
        out = call(*leaves)
        grads = torch.autograd.grad(out, leaves, given[3].to(dtype), materialize_grads=True)
        found[name] = [out.detach() * real, *grads]
    if queries <= 16:  # without gradients the decode kernels serve it
        with torch.no_grad():
            again = ours(*given[:3]) * real
        check(
            case,
            "output without gradients",
            again,
            found["truth"][0],
            found["plain"][0],
            SLACK[case.dtype],
        )
    for n, name in enumerate(("output", "dq", "dk", "dv")):
        least = (GRADIENTS if n else SLACK)[case.dtype]
        check(case, name, found["ours"][n], found["truth"][n], found["plain"][n], least)


def check(case: Case, what: str, got: Tensor, truth: Tensor, plain: Tensor, least: float) -> None:
    scale = case.sizes[5] ** -0.5 if case.scale is None else case.scale
    # dq and dk are sums of such terms that cancel; with few keys next to nothing is left but their
    # rounding
    term = 0.2 * scale * case.sizes[6] ** 0.5 if what in ("dq", "dk") else 0.01

    def error(x: Tensor) -> float:
        size = truth.square().mean().sqrt().clamp(min=term)
        return ((x.double() - truth).square().mean().sqrt() / size).item()

    budget = max(least, 2 * error(plain) + (0 if what.startswith("d") else least))
    assert error(got) <= budget, f"{what}: error {error(got):.2e}, allowed {budget:.2e}, in {case}"


def run_all(seeds: range, impl: str, small: bool = False) -> None:
    for seed in seeds:
        case = Case.of(seed, small)
        try:
            run(case, impl)
        except AssertionError:
            raise
        except Exception as other:
            raise AssertionError(f"{type(other).__name__}: {other}, in {case}") from other


@pytest.mark.parametrize("part", range(10))
def test_two_hundred(part):
    run_all(range(20 * part, 20 * part + 20), "torch")


@pytest.mark.parametrize("part", range(3))
def test_some_on_triton(part):
    run_all(range(3 * part, 3 * part + 3), "triton", small=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(40))
def test_two_thousand(part):
    run_all(range(50 * part, 50 * part + 50), "torch")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_on_triton(part):
    run_all(range(100 + 10 * part, 110 + 10 * part), "triton", small=True)
