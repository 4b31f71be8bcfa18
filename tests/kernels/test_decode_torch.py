"""The torch path of decoding against the definition in fp64, over every layout; and token for token
as transformers.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from effattn.kernels.decode import attention, torch_impl
from effattn.kernels.flash import Blocks, Layout, Pattern, Window
from effattn.kernels.flash.reference import attention as reference

KEYS = 50
PATTERNS = [
    Pattern(),
    Pattern(first=3),
    Window(back=20),
    Window(first=4, back=20),
    Window(first=3, back=9, ahead=7),
    Window(back=80),
    Blocks(size=16),
    Blocks(first=2, size=24, look_back=1),
    Blocks(size=10, shifted=True),
    Blocks(first=3, size=8, look_back=1, shifted=True),
    Blocks(size=100),
]
START = torch.tensor([5, 33])
REAL = torch.rand(2, KEYS, generator=torch.Generator().manual_seed(0)) > 0.2
RING = torch.arange(60, 60 + KEYS).roll(7)
FILLING = torch.where(torch.arange(KEYS) < 5, -1, RING)
LAYOUTS = {
    "in order": Layout(),
    "left": Layout(start=START),
    "almost all padding": Layout(start=torch.tensor([KEYS, 49])),
    "holes": Layout(mask=REAL),
    "left and holes": Layout(start=START, mask=REAL),
    "evicted": Layout(tail=30),
    "slots": Layout(slots=3, tail=70),
    "slots and left": Layout(slots=3, tail=70, start=START),
    "slots twice": Layout(
        4,
        4,
        START,
        torch.cat(
            [torch.ones(2, 4, dtype=torch.bool), torch.arange(4, KEYS) - START[:, None] >= 4], dim=1
        ),
    ),
    "ring": Layout(ring=RING, total=110),
    "filling ring": Layout(ring=FILLING, total=110, start=START),
    "slots and ring": Layout(slots=4, ring=FILLING[4:], total=110),
    "slots anywhere": Layout(
        slots=4, slots_at=torch.tensor([0, 9, 22, 63]), ring=FILLING[4:], total=110
    ),
}


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def inputs(
    batch=2,
    heads=4,
    kv_heads=2,
    queries=1,
    keys=KEYS,
    dim=16,
    value_dim=16,
    dtype=torch.float64,
    seed=0,
):
    shapes = (heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)
    return [draw(batch, *shape, dtype=dtype, seed=3 * seed + n) for n, shape in enumerate(shapes)]


def run(*args, **options):
    return attention(*args, impl="torch", **options)


def expected(q, k, v, pattern, layout, *, causal=True, counts=None, softcap=None, q_first=None):
    at = layout.key_positions(k.shape[2], k.device)
    if counts is None:
        i = layout.query_positions(q.shape[2], k.shape[2], k.device)[:, None, :, None]
        heads = torch.arange(q.shape[1])[None, :, None, None]
        counts = pattern.sees(i, at[:, None, None, :], heads, q.shape[1], causal)
    first = (at >= 0) & (at < pattern.first)
    return reference(
        q, k, v, counts, scale=q.shape[-1] ** -0.5, softcap=softcap, q_first=q_first, first=first
    )


def compare(q, k, v, pattern=None, layout=None, **options):
    truth, sums = expected(q, k, v, pattern or Pattern(), layout or Layout(), **options)
    out, lse = run(q, k, v, pattern, layout, lse=True, **options)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(lse, sums)
    torch.testing.assert_close(run(q, k, v, pattern, layout, **options), truth)  # another path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_the_definition(pattern, layout):
    for causal in (True, False):
        for queries in (1, 5):
            compare(*inputs(queries=queries), pattern, LAYOUTS[layout], causal=causal)


@pytest.mark.parametrize(
    "pattern",
    [
        Window(back=20),
        Window(first=4, back=20),
        Blocks(first=3, size=16),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "start",
    [None, torch.tensor([0, 3])],
    ids=["unpadded", "left"],
)
def test_as_the_pattern_fills(pattern, start):
    for keys in range(16, 45):
        compare(*inputs(keys=keys), pattern, Layout(start=start))
        # the first keys are gone
        compare(*inputs(keys=keys), pattern, Layout(start=start, tail=100 - keys))


@settings(deadline=None, max_examples=80)
@given(
    pattern=st.sampled_from(PATTERNS),
    layout=st.sampled_from(sorted(LAYOUTS)),
    causal=st.booleans(),
    heads=st.sampled_from(
        [
            (4, 4),
            (6, 2),
            (3, 1),
            (5, 5),
        ]
    ),
    queries=st.integers(1, 16),
    value_dim=st.sampled_from([16, 8]),
    softcap=st.sampled_from([None, 2.0]),
    other=st.booleans(),
)
def test_options_equal_the_definition(
    pattern, layout, causal, heads, queries, value_dim, softcap, other
):
    q, k, v = inputs(2, *heads, queries=queries, value_dim=value_dim)
    q_first = draw(*q.shape, seed=9) if other else None
    compare(q, k, v, pattern, LAYOUTS[layout], causal=causal, softcap=softcap, q_first=q_first)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 3, KEYS),
        (1, 1, 3, KEYS),
        (2, 1, 3, KEYS),
        (1, 4, 3, KEYS),
    ],
)
def test_counts(shape):
    counts = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(1))
    counts[:, :, 1] = 0  # sees nothing
    for kind in (counts, counts > 0):
        compare(*inputs(queries=3), counts=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_without_keys_are_zero(dtype):
    q, k, v = (x.requires_grad_() for x in inputs(dtype=dtype))
    layout = Layout(start=torch.tensor([KEYS, 10]))
    for pattern in (Pattern(), Window(back=8), Blocks(size=16)):
        out = run(q, k, v, pattern, layout)
        assert (out[0] == 0).all()
        assert (out[1] != 0).any()
        for grad in torch.autograd.grad(out.sum(), (q, k, v)):
            assert (grad[0] == 0).all()  # not NaN


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(),
        Window(first=2, back=9),
        Blocks(size=8, shifted=True),
    ],
    ids=str,
)
def test_gradcheck(pattern):
    leaves = [x.requires_grad_() for x in inputs(1, 2, 1, 3, 14, 3, 2)]
    for options in ({}, {"lse": True, "softcap": 2.0}):
        assert torch.autograd.gradcheck(
            lambda *x, o=options: run(*x, pattern, Layout(), **o), leaves
        )


@pytest.mark.parametrize(
    ("pattern", "held"),
    [
        (Window(back=20), 20),
        (Window(first=4, back=20), 24),
        (Blocks(size=16, look_back=1), 18),
    ],
)
def test_what_no_query_sees_is_not_read(pattern, held, monkeypatch):
    q, k, v = inputs()
    out = run(q, k, v, pattern)
    seen = []
    inner = torch_impl._fused
    monkeypatch.setattr(
        torch_impl, "_fused", lambda q, k, v, m, s: seen.append((k, m)) or inner(q, k, v, m, s)
    )
    k[:, :, pattern.first : KEYS - held + pattern.first] = torch.nan
    assert torch.equal(run(q, k, v, pattern), out)
    used, mask = seen[0]
    assert used.shape[2] == held
    assert mask is None  # nothing left to hide
    # a view
    assert pattern.first or used.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize(
    "pattern",
    [Pattern(), Window(first=4, back=300)],
    ids=str,
)
def test_error_is_at_most_twice_that_of_plain_torch(dtype, heads, pattern):
    q, k, v = inputs(4, *heads, keys=1000, dim=32, value_dim=32, dtype=dtype)
    groups = heads[0] // heads[1]
    seen = pattern.sees(
        torch.tensor(999), torch.arange(1000), torch.zeros(1, dtype=torch.long), 1, True
    )
    plain = torch.nn.functional.scaled_dot_product_attention(
        q,
        k.repeat_interleave(groups, 1),
        v.repeat_interleave(groups, 1),
        attn_mask=seen[None, None, None],
    )
    truth, _ = expected(
        q.double(),
        k.double(),
        v.double(),
        pattern,
        Layout(),
    )
    for options in ({}, {"lse": True}):
        ours = run(q, k, v, pattern, **options)
        ours = ours[0] if options else ours
        assert ours.dtype == dtype
        assert rms(ours - truth) <= 2 * rms(plain - truth) + 1e-12
        assert rms(ours - truth) < 0.005 * rms(truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("keys", [7, 700])
@pytest.mark.parametrize("padded", [False, True])
def test_dense_rounds_as_transformers_does(dtype, heads, keys, padded):
    """Bit for bit, so that greedy decoding gives the same tokens."""
    q, k, v = inputs(2, *heads, keys=keys, dim=64, value_dim=64, dtype=dtype)
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]
    mask = torch.arange(keys) >= torch.tensor([0, 3])[:, None] if padded else None
    theirs, _ = sdpa_attention_forward(
        module, q, k, v, None if mask is None else mask[:, None, None], scaling=0.1
    )
    layout = Layout(start=torch.tensor([0, 3]), mask=mask) if padded else Layout()
    assert torch.equal(run(q, k, v, Pattern(), layout, scale=0.1), theirs.transpose(1, 2))


@pytest.mark.parametrize(
    ("pattern", "padded", "options"),
    [
        (Pattern(), False, {}),
        (Pattern(), True, {}),
        (Window(back=20), False, {}),
        (Window(first=4, back=20), True, {}),
        (Blocks(size=16, shifted=True), True, {"softcap": 3.0, "lse": True}),
    ],
    ids=str,
)
def test_traces_once_for_all_lengths(pattern, padded, options):
    layout = Layout(start=torch.tensor([3, 7])) if padded else Layout()
    counter = CompileCounter()

    def step(q, k, v):
        out = run(q, k, v, pattern, layout, **options)
        return out if options else (out,)

    torch._dynamo.reset()
    call = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for keys in (8, 9, 10, 19, 23, 40, 59):
            q, k, v = inputs(keys=keys)
            for one, other in zip(call(q, k, v), step(q, k, v), strict=True):
                torch.testing.assert_close(one, other)
    assert counter.frame_count <= 3  # while the pattern is not full, then
