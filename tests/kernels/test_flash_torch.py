"""The torch path of exact patterns against the definition in fp64: forward, backward, log-sum-exp,
memory, precision.

Tiles are made small, so that many of them meet at lengths a reference can afford; uninitialised
memory is NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from effattn.kernels.flash import (
    Blocks,
    Layout,
    Pattern,
    Window,
    attention,
    torch_blocks,
    torch_fused,
)
from effattn.kernels.flash.pattern import layout_of
from effattn.kernels.flash.reference import attention as reference

WINDOW = Window(back=13)
PATTERNS = [
    Pattern(),
    WINDOW,
    Window(first=3, back=9),
    Window(back=5, ahead=8),
    Blocks(size=8),
    Blocks(size=11, look_back=2),
    Blocks(first=2, size=7, look_back=1),
    Blocks(size=12, shifted=True),
    Blocks(first=2, size=9, look_back=1, shifted=True),
]


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def inputs(
    batch=2,
    heads=4,
    kv_heads=2,
    queries=70,
    keys=70,
    dim=8,
    value_dim=8,
    dtype=torch.float64,
    seed=0,
):
    shapes = (heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)
    return [draw(batch, *shape, dtype=dtype, seed=3 * seed + n) for n, shape in enumerate(shapes)]


def run(*args, **options):
    return attention(*args, impl="torch", **options)


def expected(q, k, v, pattern, layout, *, causal=True, softcap=None, q_first=None):
    at = layout.key_positions(k.shape[2], k.device)
    i = layout.query_positions(q.shape[2], k.shape[2], k.device)[:, None, :, None]
    heads = torch.arange(q.shape[1])[None, :, None, None]
    seen = pattern.sees(i, at[:, None, None, :], heads, q.shape[1], causal)
    first = (at >= 0) & (at < pattern.first)
    scale = q.shape[-1] ** -0.5
    return reference(q, k, v, seen, scale=scale, softcap=softcap, q_first=q_first, first=first)


def layouts(kind: str, batch: int, keys: int, seed: int = 0) -> Layout:
    """Padding of every kind, and keys that outlived a ring in front (`slots`)."""
    real = torch.ones(batch, keys, dtype=torch.bool)
    for row in range(batch):
        pads = (row + seed % 3) * keys // (batch + 1)
        if kind == "left":
            real[row, :pads] = False
        if kind == "right":
            real[row, keys - pads :] = False
    if kind == "holes":
        real = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) > 0.4
    if kind == "slots":
        return Layout(slots=3, tail=3 + 2 * batch + seed, start=torch.arange(batch) * 2)
    # the ring has not turned yet: positions 0 to 2 are there twice, and masked once
    if kind == "slots twice":
        real[:, 3:6] = False
        return Layout(slots=3, tail=0, mask=real)
    return layout_of(None if kind == "none" else real)


KINDS = ("none", "left", "right", "holes", "slots", "slots twice")


@pytest.fixture
def small(monkeypatch):
    small_tiles(monkeypatch)


def small_tiles(patch, queries=16, keys=11, work=64, short=0):
    patch.setattr(torch_blocks, "QUERIES", queries)
    patch.setattr(torch_blocks, "KEYS", keys)
    patch.setattr(torch_blocks, "WORK", work)
    patch.setattr(torch_fused, "FORWARD", queries)
    patch.setattr(torch_fused, "BACKWARD", queries)
    patch.setattr(torch_fused, "ROOM", work * 10)
    patch.setattr(torch_fused, "SIDE", queries)
    patch.setattr(torch_fused, "SHORT", short)


@pytest.fixture(autouse=True)
def poison():
    """`torch.empty` is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def compare(q, k, v, pattern, layout, *, causal, softcap=None, q_first=None):
    """Output, log-sum-exp and all gradients, of a loss that weighs both."""
    leaves = [x.requires_grad_() for x in (q, k, v, q_first) if x is not None]
    options = dict(causal=causal, softcap=softcap, q_first=q_first)
    out, lse = run(q, k, v, pattern, layout, lse=True, **options)
    truth, sums = expected(q, k, v, pattern, layout, **options)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(lse, sums)
    with torch.no_grad():
        torch.testing.assert_close(run(q, k, v, pattern, layout, **options), truth)
    weights, weights_lse, seen = draw(*out.shape, seed=7), draw(*lse.shape, seed=8), sums.isfinite()
    got, right = (
        torch.autograd.grad(
            (o * weights).sum() + (torch.where(seen, s, 0.0) * weights_lse).sum(),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
        for o, s in ((out, lse), (truth, sums))
    )
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other)  # fails on NaN


@settings(deadline=None, max_examples=150)
@given(
    pattern=st.sampled_from(PATTERNS),
    kind=st.sampled_from(KINDS),
    causal=st.booleans(),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(1, 60),
    past=st.integers(0, 30),
    value_dim=st.sampled_from([8, 5]),
    softcap=st.sampled_from([None, 2.0]),
    other=st.booleans(),
    tile=st.sampled_from([16, 17, 64]),
    keys_at_a_time=st.sampled_from([7, 32]),
    work=st.sampled_from([64, 10**6]),
    way=st.sampled_from(["fused", "one tile", "loop"]),
    seed=st.integers(0, 5),
)
def test_equals_the_definition(
    pattern,
    kind,
    causal,
    batch,
    kv_heads,
    groups,
    queries,
    past,
    value_dim,
    softcap,
    other,
    tile,
    keys_at_a_time,
    work,
    way,
    seed,
):
    keys = queries + past + (6 if "slots" in kind else 0)
    heads = groups * kv_heads
    q, k, v = inputs(batch, heads, kv_heads, queries, keys, value_dim=value_dim, seed=seed)
    q_first = draw(*q.shape, seed=99) if other else None
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, tile, keys_at_a_time, work, short=99 if way == "one tile" else 0)
        if way == "loop":
            patch.setattr(torch_fused, "fits", lambda *_: False)
        compare(
            q,
            k,
            v,
            pattern,
            layouts(kind, batch, keys, seed),
            causal=causal,
            softcap=softcap,
            q_first=q_first,
        )


@pytest.mark.parametrize(
    "pattern", [*PATTERNS, Window(back=1), Blocks(size=1), Window(first=200, back=3)]
)
@pytest.mark.parametrize("kind", ["none", "left", "holes"])
@pytest.mark.parametrize("short", [0, 99])
def test_every_pattern_and_padding(pattern, kind, short, monkeypatch):
    small_tiles(monkeypatch, short=short)
    for causal in (True, False):
        compare(*inputs(batch=3), pattern, layouts(kind, 3, 70), causal=causal)


@pytest.mark.parametrize(
    "heads",
    [
        (6, 3),
        (5, 5),
        (6, 2),
        (3, 1),
        (1, 1),
    ],
)
def test_shifted_halves_may_meet_inside_of_a_group(heads, small):
    compare(
        *inputs(1, *heads),
        Blocks(size=10, look_back=1, shifted=True),
        Layout(),
        causal=True,
    )


def test_gradcheck(small):
    q, k, v = (
        x.requires_grad_()
        for x in inputs(
            1,
            2,
            1,
            queries=6,
            keys=9,
            dim=3,
            value_dim=2,
        )
    )
    q_first = draw(*q.shape, seed=5).requires_grad_()
    layout = Layout(start=torch.tensor([1]))

    def call(q, k, v, q_first, softcap):
        return run(
            q, k, v, Window(first=2, back=4), layout, q_first=q_first, softcap=softcap, lse=True
        )

    for softcap in (None, 1.5):
        assert torch.autograd.gradcheck(call, (q, k, v, q_first, softcap))


@pytest.mark.parametrize(
    "pattern", [Pattern(), WINDOW, Window(first=3, back=9), Blocks(size=11, look_back=1)]
)
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("options", [{"lse": True}, {"softcap": 5.0}], ids=str)
def test_the_future_changes_nothing(pattern, kind, options, small):
    q, k, v = inputs(dtype=torch.float32)
    layout, cut = layouts(kind, 2, 70), 41

    def both():
        out = run(q, k, v, pattern, layout, **options)
        return out if isinstance(out, tuple) else (out,)

    before = both()
    for x in (q, k, v):
        x[:, :, cut:] = 1e3 * draw(1, dtype=torch.float32)
    for one, other in zip(before, both(), strict=True):
        assert torch.equal(one[:, :, :cut], other[:, :, :cut])  # bit for bit


def test_hidden_keys_do_not_matter(small):
    q, k, v = inputs()
    layout = layouts("left", 2, 70, seed=1)
    out = run(q, k, v, Window(first=2, back=9), layout)
    hidden = ~layout.mask[:, None, :, None].expand_as(k)
    k[hidden], v[hidden] = 1e4, -1e4
    assert torch.equal(run(q, k, v, Window(first=2, back=9), layout), out)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_queries_without_keys_have_no_gradient_whatever_comes_in(softcap, small):
    leaves = [x.requires_grad_() for x in inputs()]
    out, lse = run(
        *leaves,
        WINDOW,
        layouts("left", 2, 70, seed=1),
        softcap=softcap,
        lse=True,
    )
    blind = lse == -torch.inf
    assert blind.any()
    assert (out[blind] == 0).all()
    upstream = torch.where(blind, torch.nan, 1.0)  # of (lse - lse).exp(), say
    for grad in torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), upstream)):
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    "pattern",
    [
        Window(back=64),
        Window(first=4, back=64),
        Blocks(size=64, look_back=1),
    ],
)
def test_strided_inputs_as_transformers_passes_them(pattern):
    q, k, v = inputs(queries=300, keys=300, dtype=torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for softcap in (None, 20.0):
        out = run(q, k, v, pattern, softcap=softcap)
        torch.testing.assert_close(run(*strided, pattern, softcap=softcap), out)


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "pattern",
    [
        Window(back=100),
        Window(first=4, back=50),
        Blocks(size=64, look_back=1),
    ],
)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_error_is_at_most_twice_that_of_plain_torch(dtype, pattern, softcap):
    q, k, v = (x.requires_grad_() for x in inputs(1, 4, 4, 400, 400, 32, 32, dtype))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth, _ = expected(*exact, pattern, Layout(), softcap=softcap)
    ours = run(q, k, v, pattern, softcap=softcap)
    assert ours.dtype == dtype
    at = torch.arange(400)
    seen = pattern.sees(at[:, None], at, torch.zeros(1, dtype=torch.long), 4, True)
    if softcap is None:
        plain = scaled_dot_product_attention(q, k, v, attn_mask=seen)
    else:  # what models with a soft cap run: products in their dtype, the softmax in fp32
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * 32**-0.5 / softcap)
        plain = scores.masked_fill(~seen, -torch.inf).float().softmax(-1).to(dtype) @ v
    weights = draw(*truth.shape)
    right = [truth, *torch.autograd.grad(truth, exact, weights)]
    for one, other, exactly in zip(
        [ours, *torch.autograd.grad(ours, (q, k, v), weights.to(dtype))],
        [plain, *torch.autograd.grad(plain, (q, k, v), weights.to(dtype))],
        right,
        strict=True,
    ):
        assert rms(one - exactly) <= 2 * rms(other - exactly) + 1e-12
        assert rms(one - exactly) < 0.005 * rms(exactly)


@pytest.mark.parametrize("tokens", [100, 400])
@pytest.mark.parametrize("pattern", [Window(first=4, back=50), Blocks(size=64, look_back=1)])
def test_products_in_bf16_where_the_cpu_has_units(pattern, tokens, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    q, k, v = (x.requires_grad_() for x in inputs(1, 4, 2, tokens, tokens, 32, 32, torch.bfloat16))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth, ours = (
        run(*x, pattern, layouts("left", 1, tokens), lse=True) for x in (exact, (q, k, v))
    )
    weights = [draw(*x.shape) for x in truth]
    right = torch.autograd.grad(truth, exact, weights)
    got = torch.autograd.grad(
        ours, (q, k, v), [w.to(x.dtype) for w, x in zip(weights, ours, strict=True)]
    )
    for one, other in zip([*ours, *got], [*truth, *right], strict=True):
        assert rms(one - other) < 0.006 * rms(other)


def test_large_scores_do_not_overflow():
    q, k, v = (30 * x for x in inputs(dtype=torch.float32))
    for options in ({}, {"softcap": 1e4}):
        out, lse = run(q, k, v, WINDOW, lse=True, **options)
        truth, sums = expected(
            q.double(),
            k.double(),
            v.double(),
            WINDOW,
            Layout(),
            **options,
        )
        torch.testing.assert_close(out.double(), truth, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-3)


def largest_tensors(call) -> int:
    """Elements of the largest tensor that any operation of `call` returns."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.largest = max(
                        self.largest, x.untyped_storage().nbytes() // x.element_size()
                    )
            return out

    with Watch() as watch:
        call()
    return watch.largest


@pytest.mark.parametrize(
    "pattern",
    [
        Window(back=64),
        Window(first=4, back=64),
        Blocks(size=64),
        Pattern(),
    ],
)
@pytest.mark.parametrize("kind", ["none", "left"])
def test_memory_is_linear(pattern, kind):
    torch.use_deterministic_algorithms(False)

    def largest(tokens):
        x = inputs(1, 1, 1, tokens, tokens, 8, 8, torch.float32)
        layout = layouts(kind, 1, tokens, seed=1)

        def call():
            for softcap in (None, 5.0):
                leaves = [t.clone().requires_grad_() for t in x]
                out, lse = run(*leaves, pattern, layout, softcap=softcap, lse=True)
                (out.sum() + lse[:, :, -5:].sum()).backward()

        return largest_tensors(call)

    assert largest(4096) <= 2.1 * largest(2048)
    assert largest(4096) <= 4096 * 256


def test_only_the_keys_in_reach_are_touched():
    q, k, v = inputs(1, 2, 1, queries=20, keys=5000, dtype=torch.float32)
    out = run(q, k, v, Window(back=30), softcap=9.0)
    k[:, :, : 5000 - 20 - 29] = torch.nan
    assert torch.equal(run(q, k, v, Window(back=30), softcap=9.0), out)


@pytest.mark.parametrize(
    "pattern", [Pattern(), Window(first=2, back=20), Blocks(size=16, shifted=True)]
)
@pytest.mark.parametrize("kind", ["none", "left"])
def test_traces(pattern, kind):
    torch.use_deterministic_algorithms(False)
    layout = layouts(kind, 2, 40)
    call = torch.compile(
        lambda *x: run(*x, pattern, layout, lse=True), backend="eager", fullgraph=True
    )
    q, k, v = inputs(queries=40, keys=40)
    with torch.no_grad():
        for one, other in zip(call(q, k, v), run(q, k, v, pattern, layout, lse=True), strict=True):
            torch.testing.assert_close(one, other)
