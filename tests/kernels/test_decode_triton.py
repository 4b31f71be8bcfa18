"""The Triton decode kernel against the definition in fp64: in the interpreter, or on the GPU where
there is one.

Everything that torch leaves uninitialised is NaN while the kernel runs, so an element that is read
before it is written, or never written, shows."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from effattn.kernels.decode import attention, triton_impl
from effattn.kernels.flash import Blocks, Layout, Pattern, Window
from effattn.kernels.flash.pattern import layout_of
from effattn.kernels.flash.reference import attention as reference
from effattn.kernels.rows import dense_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def inputs(
    batch=2,
    heads=2,
    kv_heads=1,
    queries=1,
    keys=70,
    dim=32,
    value_dim=None,
    dtype=torch.float32,
    seed=0,
):
    """Random q, k, v with scores of size 1 to 3, so that the softmax is neither flat nor
    one-hot.
    """
    q = 2 * draw(batch, heads, queries, dim, seed=seed)
    k, v = (
        draw(batch, kv_heads, keys, width, seed=seed + 1 + width)
        for width in (dim, value_dim or dim)
    )
    return q.to(dtype), k.to(dtype), v.to(dtype)


def kernel(q, k, v, pattern=None, layout=None, **options):
    """The kernel's (out, lse), with every uninitialised element NaN; deterministic, so run it
    twice.
    """
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        out, lse = attention(q, k, v, pattern, layout, impl="triton", lse=True, **options)
        assert out.dtype == q.dtype
        assert lse.dtype == torch.float32
        return out, lse
    finally:
        torch.use_deterministic_algorithms(False)


def expected(
    q,
    k,
    v,
    pattern=None,
    layout=None,
    *,
    causal=True,
    counts=None,
    q_first=None,
    scale=None,
    softcap=None,
):
    """The definition's (out, lse), fp64."""
    pattern, layout, keys = pattern or Pattern(), layout or Layout(), k.shape[2]
    at = layout.key_positions(keys, k.device)
    if counts is None:
        i = layout.query_positions(q.shape[2], keys, k.device)[:, None, :, None]
        heads = torch.arange(q.shape[1], device=k.device)[None, :, None, None]
        counts = pattern.sees(i, at[:, None, None, :], heads, q.shape[1], causal)
    first = (at >= 0) & (at < pattern.first)
    return reference(
        q.double(),
        k.double(),
        v.double(),
        counts,
        scale=scale or q.shape[-1] ** -0.5,
        softcap=softcap,
        q_first=q_first,
        first=first,
    )


def error(got, want):
    """RMS of the error over RMS of what is wanted."""
    return (
        (got.double() - want).square().mean().sqrt() / want.square().mean().sqrt().clamp(min=1e-30)
    ).item()


def check(q, k, v, pattern=None, layout=None, **options):
    """fp32: both outputs right, and exactly 0 and -inf where nothing is seen."""
    out, lse = kernel(q, k, v, pattern, layout, **options)
    want, want_lse = expected(q, k, v, pattern, layout, **options)
    blind = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, blind)
    assert (out[blind] == 0).all()
    assert error(out, want) < 1e-5
    assert blind.all() or error(lse[~blind], want_lse[~blind]) < 1e-5
    return out, lse


@pytest.fixture
def splits(monkeypatch):
    """Sets the number of splits that are wanted; there are never more than tiles, and never an
    empty one.
    """

    def set_to(wanted):
        def split(tiles, programs, processors):
            parts = min(wanted, tiles)
            return -(-tiles // -(-tiles // parts))

        monkeypatch.setattr(triton_impl, "split", split)

    return set_to


@pytest.mark.parametrize("keys", [1, 2, 31, 32, 97, 251])
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_any_number_of_keys_and_queries(keys, queries):
    check(*inputs(queries=min(queries, keys), keys=keys, batch=1))


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [
        (1, 1),
        (3, 3),
        (6, 2),
        (8, 1),
        (40, 1),
    ],
)
def test_mha_gqa_and_mqa(heads, kv_heads):
    check(*inputs(heads=heads, kv_heads=kv_heads, queries=2))


@pytest.mark.parametrize(
    ("dim", "value_dim"),
    [
        (8, 8),
        (64, 128),
        (80, 48),
        (24, 16),
        (256, 256),
    ],
)
def test_any_head_dimensions(dim, value_dim):
    check(*inputs(dim=dim, value_dim=value_dim, batch=1, queries=2))


PATTERNS = [
    Window(back=1),
    Window(back=40),
    Window(back=40, ahead=3),
    Window(back=10**12, ahead=10**12),
    Window(back=20, first=3),
    Window(back=3, first=60),
    Pattern(first=5),
    Blocks(size=16),
    Blocks(size=50, look_back=1),
    Blocks(size=10**12),
    Blocks(size=16, look_back=1, shifted=True),
    Blocks(size=32, shifted=True, first=7),
    Blocks(size=7, first=200),
]


def left_padding(keys, rows=(0, 9)):
    return layout_of(torch.stack([torch.arange(keys) >= n for n in rows]).to(DEVICE))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("padded", [False, True])
def test_patterns(pattern, padded):
    """150 keys of which windows and blocks leave most unread; padded rows shift every border."""
    q, k, v = inputs(queries=5, keys=150)
    layout = left_padding(150, (0, 77)) if padded else Layout()
    check(q, k, v, pattern, layout)


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(),
        Window(back=9, ahead=4),
        Window(back=9, first=3),
        Blocks(size=16),
    ],
    ids=repr,
)
def test_bidirectional(pattern):
    check(*inputs(queries=16, keys=16), pattern, left_padding(16), causal=False)


def test_only_what_a_window_sees_is_read():
    """What lies outside is NaN: it would come through."""
    q, k, v = inputs(keys=300, queries=2)
    want, _ = expected(q, k, v, Window(back=20, first=3))
    k[:, :, 40:240], v[:, :, 40:240] = torch.nan, torch.nan
    out, _ = kernel(q, k, v, Window(back=20, first=3))
    assert error(out, want) < 1e-5
    k[:, :, :40], v[:, :, :40] = torch.nan, torch.nan
    assert kernel(q, k, v, Blocks(size=32))[0].isfinite().all()


@pytest.mark.parametrize("padding", ["none", "left", "right", "both", "a row of nothing"])
def test_padding(padding, splits):
    splits(5)
    keys = 150
    at = torch.arange(keys)
    rows = {
        "none": [at >= 0, at >= 0],
        "left": [at >= 0, at >= 147],
        "right": [at < 149, at < 5],
        "both": [(at >= 20) & (at < 90), at >= 3],
        "a row of nothing": [at >= 4, at < 0],
    }[padding]
    layout = layout_of(torch.stack(rows).to(DEVICE))
    check(*inputs(queries=4, keys=keys), None, layout)
    check(*inputs(queries=4, keys=keys), Window(back=30, first=2), layout)


@pytest.mark.parametrize("start", [None, (0, 5), (90, 130)])
@pytest.mark.parametrize(
    ("slots", "first"),
    [
        (4, 4),
        (4, 0),
        (0, 6),
        (3, 12),
        (0, 200),
    ],
)
def test_slots_before_the_tail(slots, first, start):
    """Slots, then tokens from 100 on: first keys may lie in both, and in the tail after a row's
    padding.
    """
    start = None if start is None else torch.tensor(start, device=DEVICE)
    layout = Layout(slots=slots, tail=100, start=start)
    check(*inputs(queries=3, keys=150), Window(back=30, first=first), layout)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("slots", [0, 3])
def test_rings(slots, padded):
    """Keys in any order, some missing, slots at positions of their own: as the same keys in
    order.
    """
    keys, total = 75, 200
    order = torch.randperm(keys - slots, generator=torch.Generator().manual_seed(1))
    ring = (total - (keys - slots) + order).masked_fill(order < 8, -1)
    start = mask = None
    if padded:
        start = torch.tensor([0, 150], device=DEVICE)
        mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.3
    at = torch.tensor([0, 7, 31], device=DEVICE) if slots else None
    layout = Layout(slots, 0, start, mask, at, ring.to(DEVICE), total)
    q, k, v = inputs(queries=4, keys=keys)
    check(q, k, v, None, layout)
    check(
        q,
        k,
        v,
        Window(back=40, first=8),
        layout,
        q_first=draw(*q.shape, seed=9),
        softcap=5.0,
    )


def test_queries_for_the_first_keys():
    for pattern in (
        Pattern(first=4),
        Window(back=40, first=4),
        Blocks(size=64, first=70),
        Window(back=40),
    ):
        q, k, v = inputs(queries=3, keys=150)
        check(q, k, v, pattern, left_padding(150), q_first=draw(*q.shape, seed=9))


@pytest.mark.parametrize("softcap", [0.7, 5.0, 50.0, 1e4])
def test_softcap_and_scale(softcap):
    q, k, v = inputs(queries=2, batch=1)
    check(q, 3 * k, v, softcap=softcap)
    check(q, k, v, softcap=softcap, scale=0.01)


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (torch.bool, (1, 1)),
        (torch.int32, (2, 4)),
        (torch.int64, (1, 4)),
    ],
)
def test_counts(dtype, rows, splits):
    """Instead of pattern, causality and padding; some queries see nothing."""
    splits(3)
    q, k, v = inputs(queries=3, keys=150, heads=4)
    counts = torch.randint(0, 4, (*rows, 3, 150), generator=torch.Generator().manual_seed(3))
    counts[:, :, 1] = 0
    check(q, k, v, Window(back=1), left_padding(150), counts=counts.to(dtype).to(DEVICE))
    first, other = Window(back=1, first=20), draw(*q.shape, seed=9)
    check(
        q,
        k,
        v,
        first,
        left_padding(150),
        counts=counts.to(dtype).to(DEVICE),
        q_first=other,
    )


@pytest.mark.parametrize("wanted", [1, 2, 7, 100])
def test_splits_agree(wanted, splits):
    splits(wanted)
    q, k, v = inputs(queries=2, keys=250, batch=1)
    out, lse = check(q, k, v, Window(back=200))
    again, lse_again = kernel(q, k, v, Window(back=200))
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


def test_split_fills_the_device_and_leaves_nothing_empty():
    for tiles in (0, 1, 2, 7, 64, 1000):
        for programs in (1, 8, 100, 1000):
            parts = triton_impl.split(tiles, programs, 132)
            assert 1 <= parts <= max(tiles, 1)
            if tiles:
                assert (parts - 1) * -(-tiles // parts) < tiles
    assert triton_impl.split(1024, 8, 132) * 8 > 132  # one sequence, long
    assert triton_impl.split(1024, 132 * 2, 132) == 1  # full as it is
    assert triton_impl.split(2, 1, 132) == 1  # not worth a second launch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [1, 4])
def test_half_precision_is_as_exact_as_torch(dtype, wanted, splits):
    splits(wanted)
    q, k, v = inputs(
        batch=1,
        queries=3,
        keys=260,
        heads=4,
        kv_heads=2,
        dim=64,
        dtype=dtype,
    )
    pattern = Window(back=200, first=2)
    want, want_lse = expected(q, k, v, pattern)
    at = torch.arange(260, device=DEVICE)
    mask = pattern.sees(at[-3:, None], at[None, :], at[:1, None], 4, True)
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * 64**-0.5
    plain = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v.repeat_interleave(2, dim=1)
    out, lse = kernel(q, k, v, pattern)
    assert error(out, want) <= 2 * error(plain, want)
    assert error(out, want) < 0.005
    assert error(lse, want_lse) < 1e-4


def test_views_of_a_cache_are_read_in_place():
    """A (B, T, H, D) cache with room, queries as they leave a projection: nothing is copied,
    nothing else is read.
    """
    q, k, v = inputs(queries=3, keys=90, heads=4, kv_heads=2)
    cache = torch.full((2, 2, 128, 2, 40), torch.nan, device=DEVICE)
    views = [cache[n, :, 20:110, :, :32].transpose(1, 2) for n in range(2)]
    for view, x in zip(views, (k, v), strict=True):
        view.copy_(x)
        assert dense_rows(view) is view
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    want, _ = kernel(q, k, v)
    assert torch.equal(kernel(turned, *views)[0], want)
    assert torch.equal(kernel(q, k.mT.contiguous().mT, v)[0], want)  # copied, as it must be


def test_what_the_kernel_cannot_do_is_said():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"float64.*impl='torch'"):
        attention(q.double(), k.double(), v.double(), impl="triton")
    with pytest.raises(ValueError, match="no gradients"):
        attention(q.requires_grad_(), k, v, impl="triton")

    class Odd(Pattern):
        pass

    with pytest.raises(ValueError, match="Odd without `counts`"):
        attention(q.detach(), k, v, Odd(), impl="triton")
