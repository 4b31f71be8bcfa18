"""Triton's flash attention against the definition in fp64: outputs, log-sum-exps and all gradients.

On a CPU the kernels run in Triton's interpreter, with small tiles; on a GPU natively, at sizes with
several tiles."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from effattn.kernels.flash import attention, reference  # noqa: E402
from effattn.kernels.flash.ahead_of_time import variants  # noqa: E402
from effattn.kernels.flash.pattern import Blocks, Layout, Pattern, Window, layout_of  # noqa: E402
from effattn.kernels.flash.tiles import TILES  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
SCALE = 8 if GPU else 1  # of the lengths that must span tiles
pytestmark = pytest.mark.skipif(
    not GPU and os.environ["TRITON_INTERPRET"] != "1",
    reason="asked for compiled kernels, without a GPU",
)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that is not written to shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE)


def plain(q, k, v, counts, *, scale, softcap=None, q_first=None, first=None):
    """What one would write in torch, in the dtype of q: the budget of half precision."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.mT * scale
    if q_first is not None:
        scores = torch.where(first[:, None, None, :], q_first @ k.mT * scale, scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~counts, -torch.inf)
    blind = ~counts.any(dim=-1, keepdim=True).expand(*scores.shape[:3], 1)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1) * ~blind
    return weights @ v, torch.logsumexp(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(
        blind[..., 0], -torch.inf
    )


def error(x: torch.Tensor, true: torch.Tensor) -> float:
    """RMS(x - true) / RMS(true), where true is finite; 0 where both are all zero."""
    finite = true.isfinite()
    assert torch.equal(finite, x.isfinite()), "NaN, or infinite elsewhere"
    x, true = x.double()[finite], true.double()[finite]
    off, size = (x - true).norm().item(), true.norm().item()
    return off / size if size else off


def check(
    queries: int,
    keys: int | None = None,
    *,
    batch=1,
    heads=2,
    kv_heads=1,
    dim=16,
    value_dim=None,
    pattern=None,
    layout=None,
    causal=True,
    softcap=None,
    other=False,
    dtype=torch.float32,
    through=("out", "lse"),
    seed=0,
    like=None,
):
    """One call with gradients through `through`; `like` changes how the inputs lie in memory."""
    keys, value_dim = keys or queries, value_dim or dim
    pattern, layout = pattern or Pattern(), layout or Layout()
    shapes = {
        "q": (heads, queries, dim),
        "k": (kv_heads, keys, dim),
        "v": (kv_heads, keys, value_dim),
    }
    if other:
        shapes["q_first"] = (heads, queries, dim)
    given_ = {
        name: draw(batch, *shape, seed=seed + n).to(dtype)
        for n, (name, shape) in enumerate(shapes.items())
    }
    gradients = {
        "out": draw(batch, heads, queries, value_dim, seed=seed + 7),
        "lse": draw(batch, heads, queries, seed=8),
    }

    i = layout.query_positions(queries, keys, DEVICE)[:, None, :, None]
    at = layout.key_positions(keys, DEVICE)
    head = torch.arange(heads, device=DEVICE)[None, :, None, None]
    counts = pattern.sees(i, at[:, None, None, :], head, heads, causal)
    marks = dict(first=(at >= 0) & (at < pattern.first)) if other else {}

    def run(function, to: torch.dtype, **more) -> dict[str, torch.Tensor]:
        inputs = {name: x.to(to).requires_grad_() for name, x in given_.items()}
        laid = {name: like(x) for name, x in inputs.items()} if like else inputs
        q, k, v, *rest = laid.values()
        out, lse = function(
            q, k, v, scale=0.3, softcap=softcap, q_first=rest[0] if rest else None, **more
        )
        results = {"out": out, "lse": lse}
        sums = torch.where(lse.isfinite(), lse, 0.0)
        loss = sum(
            (x * gradients[name].to(x.dtype)).sum()
            for name, x in (("out", out), ("lse", sums))
            if name in through
        )
        found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        zeros = [torch.zeros_like(x) for x in inputs.values()]
        return {x: y.detach() for x, y in results.items()} | {
            f"d{name}": zero if x is None else x
            for name, x, zero in zip(inputs, found, zeros, strict=True)
        }

    got = run(
        attention, dtype, pattern=pattern, layout=layout, causal=causal, impl="triton", lse=True
    )
    true = run(reference.attention, torch.float64, counts=counts, **marks)
    rounded = run(plain, dtype, counts=counts, **marks) if dtype != torch.float32 else {}
    assert got["out"].dtype == dtype
    judge(got, true, rounded, ~counts.any(dim=-1).expand(batch, heads, queries))
    return got


def judge(got: dict, true: dict, rounded: dict, blind: torch.Tensor) -> None:
    """Errors are at most twice those of plain torch in that dtype (`rounded`; {}: fp32's own), and
    queries that see nothing, `blind`, give 0 and -inf."""
    assert got["lse"].dtype == torch.float32
    assert (got["out"][blind] == 0).all()
    assert torch.equal(got["lse"] == -torch.inf, blind)
    assert (got["dq"][blind] == 0).all()
    budget = dict.fromkeys(got, 2e-6)
    budget |= {name: 2 * error(x, true[name]) for name, x in rounded.items()}
    budget["lse"] = 2e-6
    errors = {name: error(x, true[name]) for name, x in got.items()}
    assert all(errors[name] <= max(budget[name], 2e-6) for name in got), (errors, budget)


def mask_of(*rows: str) -> torch.Tensor:
    """Padding masks by picture: "0" padding, "1" real."""
    return torch.tensor([[mark == "1" for mark in row] for row in rows], device=DEVICE)


TILED = 37 * SCALE
CASES = {
    "one token": dict(queries=1),
    "two tokens": dict(queries=2),
    "causal, in groups": dict(queries=TILED, heads=4, kv_heads=2),
    "a chunk at the end": dict(queries=5, keys=TILED, dim=20, value_dim=33),
    "both ways": dict(queries=19, keys=TILED, causal=False, batch=2, kv_heads=2),
    "no lse gradient": dict(queries=TILED, through=("out",)),
    "lse gradient alone": dict(queries=TILED, through=("lse",)),
    "window, two sides": dict(queries=TILED, causal=False, pattern=Window(back=5, ahead=7)),
    "window with inner tiles": dict(queries=113 * SCALE, heads=1, pattern=Window(back=71 * SCALE)),
    "window and sinks": dict(queries=TILED, pattern=Window(first=3, back=9)),
    "window and sinks, both ways": dict(
        queries=TILED, causal=False, pattern=Window(first=3, back=9, ahead=2)
    ),
    "blocks, shifted": dict(queries=TILED, pattern=Blocks(size=8, look_back=1, shifted=True)),
    "blocks, both ways": dict(queries=TILED, causal=False, pattern=Blocks(size=6, first=2)),
    "blocks with inner tiles": dict(
        queries=121 * SCALE, pattern=Blocks(size=64 * SCALE, look_back=1, shifted=True)
    ),
    "softcap": dict(queries=TILED, softcap=0.7),
    "softcap and sinks": dict(
        queries=TILED, softcap=1.5, pattern=Window(first=3, back=9), other=True
    ),
    "other queries for the first": dict(queries=67 * SCALE, pattern=Pattern(first=5), other=True),
    "other queries, both ways": dict(
        queries=TILED, pattern=Window(first=5, back=3, ahead=3), causal=False, other=True
    ),
    "other queries for none": dict(queries=9, pattern=Pattern(), other=True, heads=1),
    "slots": dict(
        queries=6,
        keys=TILED,
        pattern=Window(first=3, back=8),
        other=True,
        heads=4,
        layout=Layout(slots=3, tail=40),
    ),
    "slots, still whole": dict(
        queries=9,
        keys=24,
        pattern=Window(first=4, back=8),
        batch=2,
        heads=2,
        layout=Layout(
            slots=4,
            tail=0,
            start=torch.tensor([0, 3], device=DEVICE),
            mask=mask_of("0000" + "1" * 20, "0000" + "000" + "1" * 17),
        ),
    ),
    "slots, shifted rows": dict(
        queries=20,
        keys=31,
        pattern=Window(first=4, back=8),
        batch=2,
        heads=2,
        other=True,
        layout=Layout(
            slots=4,
            tail=5,
            start=torch.tensor([2, 8], device=DEVICE),
            mask=mask_of("1110" + "1" * 27, "1111" + "000" + "1" * 24),
        ),
    ),
    "padding on the left": dict(
        queries=23,
        batch=3,
        layout=layout_of(mask_of("0" * 5 + "1" * 18, "1" * 23, "0" * 23)),
        kv_heads=2,
    ),
    "padding on the right": dict(
        queries=23,
        batch=3,
        layout=layout_of(mask_of("1" * 5 + "0" * 18, "1" * 23, "0" * 23)),
        pattern=Window(back=6, ahead=3),
        causal=False,
    ),
    "padding over inner tiles": dict(
        queries=101 * SCALE,
        batch=2,
        heads=1,
        layout=layout_of(
            mask_of("0" * 30 * SCALE + "1" * 71 * SCALE, "1" * 99 * SCALE + "0" * 2 * SCALE)
        ),
    ),
    "padding and sinks": dict(
        queries=31,
        batch=2,
        heads=1,
        layout=layout_of(mask_of("0" * 9 + "1" * 22, "0" * 30 + "1")),
        pattern=Window(first=2, back=5),
        other=True,
    ),
    "bf16": dict(
        queries=TILED, keys=TILED + 8, pattern=Window(first=2, back=20), dtype=torch.bfloat16
    ),
    "fp16": dict(queries=TILED, keys=TILED + 8, softcap=2.0, dtype=torch.float16, value_dim=32),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case):
    check(**CASES[case])


@pytest.mark.parametrize("queries", [6, 7, 8, 17])
def test_lengths_around_the_window(queries):
    check(queries, pattern=Window(back=7), heads=1)


LAYOUTS = {
    "tokens outside of heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last size not dense": lambda x: x.mT.contiguous().mT,
    "a slice": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("how", LAYOUTS)
def test_strides(how):
    check(13, heads=2, like=LAYOUTS[how], value_dim=24)


@settings(max_examples=4 if not GPU else 60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    keys, slots = number(1, 45 * SCALE), number(0, 3)
    slots = min(slots, keys)
    queries = number(1, max(1, keys - slots)) if keys > slots else 0
    if not queries:
        return
    batch, kv_heads = number(1, 2), number(1, 2)
    first = number(0, 4)
    pattern = data.draw(
        st.sampled_from(
            [
                Pattern(first),
                Window(first, number(1, 40), number(1, 9)),
                Blocks(first, number(2, 40), number(0, 2), data.draw(st.booleans())),
            ]
        )
    )
    tail = number(slots, 30) if slots else 0
    start = mask = None
    if data.draw(st.booleans()):
        start = torch.tensor([number(0, tail + keys - slots) for _ in range(batch)], device=DEVICE)
        mask = draw(batch, keys, seed=number(0, 99)) > -1.0
    causal, capped, other = (data.draw(st.booleans()) for _ in range(3))
    check(
        queries,
        keys,
        batch=batch,
        heads=kv_heads * number(1, 2),
        kv_heads=kv_heads,
        dim=number(1, 24),
        value_dim=number(1, 24),
        pattern=pattern,
        layout=Layout(slots=slots, tail=tail, start=start, mask=mask),
        causal=causal,
        softcap=1.0 if capped else None,
        other=other,
    )


def test_tiles_that_nobody_sees_are_not_visited():
    """NaN in keys and values that a visit would spread; only the first keys and the window's own
    tiles are read.
    """
    keys, far = 150 * SCALE, 70 * SCALE
    q, k, v = (draw(1, 1, size, 16, seed=n) for n, size in enumerate((8, keys, keys)))
    k[:, :, 40 * SCALE : far] = v[:, :, 40 * SCALE : far] = torch.nan
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    for pattern in (Window(first=3, back=12), Blocks(first=3, size=16, look_back=1)):
        out = attention(q, k, v, pattern, impl="triton")
        found = torch.autograd.grad(out.sum(), (q, k, v))
        assert out.isfinite().all()
        assert all(x.isfinite().all() for x in found)
        assert (found[1][:, :, 40 * SCALE : far] == 0).all()


def test_two_runs_give_the_same_bits():
    a, b = (check(23 * SCALE) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_only_the_gradients_that_are_asked_for():
    q, k, v = (draw(1, 1, 9, 16, seed=n) for n in range(3))
    for wanted in (q, k, v):
        wanted.requires_grad_()
        out = attention(q, k, v, impl="triton")
        alone = torch.autograd.grad(out.sum(), wanted)[0]
        assert alone.isfinite().all()
        wanted.requires_grad_(False)
    assert not attention(q, k, v, impl="triton").requires_grad


def test_nothing_to_do():
    q, k = draw(1, 2, 3, 16), draw(1, 1, 0, 16)
    out, lse = attention(q, k, k, impl="triton", lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert attention(q[:0], k[:0], k[:0], impl="triton").shape == (0, 2, 3, 16)
    assert attention(q[:, :, :0], q[:, :1], q[:, :1], impl="triton").shape == (1, 2, 0, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dtype=torch.float64), "dtype: got torch.float64, valid"),
        (dict(dim=300), "head size: got 512, valid are 1 to 256"),
        (dict(layout=Layout(ring=torch.arange(4), total=4)), "layout: rings"),
        (dict(layout=Layout(slots=1, tail=1, slots_at=torch.arange(1))), "layout: rings"),
        (dict(layout=Layout(total=9)), "layout.total: got 9"),
        (
            dict(pattern=type("Mine", (Window,), {})()),
            "pattern: got Mine, valid .* Pattern, Window, Blocks",
        ),
        (dict(scale=0.0), "valid are positive numbers"),
    ],
)
def test_refusals_name_what_is_valid(changes, message):
    changes = dict(changes)
    q = torch.zeros(
        1, 1, 4, changes.pop("dim", 16), dtype=changes.pop("dtype", torch.float32), device=DEVICE
    )
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, impl="triton", **changes)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_what_is_compiled_ahead_of_time_is_whole(arch):
    found = variants(arch)
    assert len({one["name"] for one in found}) == len(found)
    for one in found:
        assert list(one["signature"]) == one["kernel"].arg_names
        assert {x for x, kind in one["signature"].items() if kind == "constexpr"} == set(
            one["constexprs"]
        )
    assert all(set(TILES[kernel][arch]) == {64, 128, 256} for kernel in TILES)
