"""Dense attention: the torch path against the fp64 reference and against plain torch in the same
dtype.
"""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from effattn.kernels import flash
from effattn.kernels.flash import torch_dense
from effattn.patterns.dense import Dense

FAST, TRUTH = Dense(impl="torch"), Dense(impl="reference")


def qkv(
    batch=2, heads=4, kv_heads=2, queries=9, keys=9, dim=8, value_dim=8, dtype=torch.float64, seed=0
):
    draw = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, queries, dim),
        (batch, kv_heads, keys, dim),
        (batch, kv_heads, keys, value_dim),
    )
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def padding(kind: str, batch: int, keys: int, seed=0):
    """Left and right padding of growing length (the last row is all padding), holes, nothing, or no
    mask.
    """
    mask = torch.ones(batch, keys, dtype=torch.bool)
    for row in range(batch):
        pads = row * keys // max(batch - 1, 1)
        if kind == "left":
            mask[row, :pads] = False
        if kind == "right":
            mask[row, keys - pads :] = False
    if kind == "holes":
        mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) > 0.6
    return None if kind == "none" else mask


def by_hand(q, k, v, causal, mask):
    """Loops, one query at a time: what the reference itself is held to."""
    out = torch.zeros(
        *q.shape[:3],
        v.shape[-1],
        dtype=q.dtype,
    )
    offset, groups = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = [
            j
            for j in range(k.shape[2])
            if (not causal or j <= i + offset) and (mask is None or bool(mask[b, j]))
        ]
        if seen:
            scores = [
                float(q[b, h, i] @ k[b, h // groups, j]) / math.sqrt(q.shape[-1]) for j in seen
            ]
            weights = torch.tensor(scores, dtype=q.dtype).softmax(0)
            out[b, h, i] = weights @ v[b, h // groups, seen]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
def test_reference_is_the_definition(causal, kind):
    q, k, v = qkv(batch=3, queries=3, keys=5, value_dim=6)
    mask = padding(kind, 3, 5)
    torch.testing.assert_close(
        TRUTH(q, k, v, causal=causal, padding_mask=mask), by_hand(q, k, v, causal, mask)
    )


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "queries": st.integers(1, 12),
        "past": st.integers(0, 12),
        "dim": st.sampled_from([1, 4, 7, 16]),
        "value_dim": st.sampled_from([1, 4, 7, 16]),
    }
)


@settings(deadline=None, max_examples=120)
@given(
    shape=shapes,
    causal=st.booleans(),
    kind=st.sampled_from(["none", "left", "right", "holes"]),
    block=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_outputs_and_gradients_equal_the_reference(shape, causal, kind, block, seed):
    shape = dict(shape)
    shape["heads"] = shape.pop("groups") * shape["kv_heads"]
    shape["keys"] = shape["queries"] + shape.pop("past")
    inputs = [x.requires_grad_() for x in qkv(**shape, seed=seed)]
    mask = padding(kind, shape["batch"], shape["keys"], seed)
    with pytest.MonkeyPatch.context() as patch:
        # many blocks at lengths that a reference can afford
        patch.setattr(torch_dense, "BLOCK", block)
        out = FAST(*inputs, causal=causal, padding_mask=mask)
    truth = TRUTH(*inputs, causal=causal, padding_mask=mask)
    torch.testing.assert_close(out, truth)
    loss = torch.randn_like(out)
    for got, expected in zip(
        torch.autograd.grad(out, inputs, loss),
        torch.autograd.grad(truth, inputs, loss),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)  # fails on NaN


@pytest.mark.parametrize("impl", [FAST, TRUTH])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_keys_are_zero(impl, queries, dtype):
    inputs = [x.requires_grad_() for x in qkv(queries=queries, dtype=dtype)]
    mask = torch.tensor([[False] * 9, [False] * 5 + [True] * 4])
    out = impl(*inputs, padding_mask=mask)
    assert (out[0] == 0).all()
    assert (out[1, :, :-4] == 0).all()
    assert (out[1, :, -1] != 0).any()
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert torch.isfinite(grad).all()
        assert (grad[0] == 0).all()


def test_padded_values_do_not_matter():
    q, k, v = qkv()
    mask = padding("left", 2, 9)
    mask[1, -3:] = True
    out = FAST(q, k, v, padding_mask=mask)
    k[~mask[:, None].expand(2, 2, 9)] = 1e4
    v[~mask[:, None].expand(2, 2, 9)] = -1e4
    assert torch.equal(FAST(q, k, v, padding_mask=mask), out)


@pytest.mark.parametrize("kind", ["none", "left", "holes"])
def test_the_future_does_not_leak(kind):
    q, k, v = qkv(queries=300, keys=310, dtype=torch.float32)
    mask = padding(kind, 2, 310)
    before = FAST(q, k, v, padding_mask=mask)
    k[:, :, 290:], v[:, :, 290:] = 7, 7  # query i is at position i + 10
    after = FAST(q, k, v, padding_mask=mask)
    torch.testing.assert_close(after[:, :, :280], before[:, :, :280])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("queries", "kind"),
    [
        (400, "none"),
        (400, "right"),
        (1, "left"),
        (300, "holes"),
    ],
)
def test_error_is_at_most_twice_that_of_plain_torch(dtype, queries, kind):
    q, k, v = qkv(
        queries=queries,
        keys=400,
        dim=32,
        value_dim=32,
        dtype=dtype,
    )
    mask = padding(kind, 2, 400)
    truth = TRUTH(q.double(), k.double(), v.double(), padding_mask=mask)
    visible = torch.ones(queries, 400, dtype=torch.bool).tril(400 - queries)[None, None]
    if mask is not None:
        visible = visible & mask[:, None, None]
    keys, values = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    plain = scaled_dot_product_attention(q, keys, values, attn_mask=visible)
    plain = torch.where(visible.any(dim=-1, keepdim=True), plain, 0.0)
    ours = FAST(q, k, v, padding_mask=mask)
    assert ours.dtype == dtype

    def rms(x):
        return x.double().square().mean().sqrt()

    assert rms(ours - truth) <= 2 * rms(plain - truth) + 1e-12
    assert rms(ours - truth) < 0.005 * rms(truth)


def test_batch_invariance():
    q, k, v = qkv(batch=3, queries=280, keys=280, dtype=torch.float32)
    mask = padding("left", 3, 280)
    together = FAST(q, k, v, padding_mask=mask)
    for row in range(2):  # the last row is all padding
        real = mask[row]
        alone = FAST(*(x[row : row + 1, :, real] for x in (q, k, v)))
        torch.testing.assert_close(together[row : row + 1, :, real], alone)


@settings(deadline=None, max_examples=40)
@given(
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    kind=st.sampled_from(["none", "left", "right"]),
)
def test_decode_equals_prefill(chunks, kind):
    total = sum(chunks)
    q, k, v = qkv(queries=total, keys=total)
    mask = padding(kind, 2, total)
    whole, state, start = FAST(q, k, v, padding_mask=mask), FAST.new_state(), 0
    for size in chunks:
        stop = start + size
        seen = None if mask is None else mask[:, :stop]
        step = FAST(
            *(x[:, :, start:stop] for x in (q, k, v)),
            padding_mask=seen,
            state=state,
        )
        torch.testing.assert_close(step, whole[:, :, start:stop])
        start = stop
    assert state.seq_len == total
    assert state.nbytes == k.nbytes + v.nbytes


def test_beam_search_and_rollback_through_the_state():
    q, k, v = qkv(batch=3)
    index = torch.tensor([2, 2, 0])
    state = FAST.new_state()
    FAST(
        q[:, :, :7],
        k[:, :, :7],
        v[:, :, :7],
        state=state,
    )
    state.crop(5)
    state.reorder(index)
    new = [x[index, :, 5:] for x in (q, k, v)]
    torch.testing.assert_close(
        FAST(*new, state=state), FAST(*(x[index] for x in (q, k, v)))[:, :, 5:]
    )
    state.crop(5)
    state.select(torch.tensor([0]))
    state.repeat(3)
    new = [x[[2, 2, 2], :, 5:] for x in (q, k, v)]
    torch.testing.assert_close(
        FAST(*new, state=state), FAST(*(x[[2, 2, 2]] for x in (q, k, v)))[:, :, 5:]
    )


def test_gradcheck():
    inputs = [
        x.requires_grad_()
        for x in qkv(
            batch=2,
            queries=3,
            keys=4,
            dim=3,
            value_dim=2,
        )
    ]
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    assert torch.autograd.gradcheck(lambda *x: FAST(*x, padding_mask=mask), inputs)


def test_no_mask_of_all_queries_by_all_keys(monkeypatch):
    sizes = []

    def spy(*args, attn_mask=None, **kwargs):
        sizes.append(0 if attn_mask is None else attn_mask.numel())
        return scaled_dot_product_attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch_dense, "scaled_dot_product_attention", spy)
    q, k, v = qkv(queries=1024, keys=1024, dtype=torch.float32)
    FAST(q, k, v)
    assert sizes == [0]
    FAST(q[:, :, -1:], k, v)
    assert sizes == [0, 0]
    FAST(q, k, v, padding_mask=padding("left", 2, 1024))
    FAST(q[:, :, 1:], k, v)
    assert max(sizes) == 2 * torch_dense.BLOCK * 1024
    assert flash.choose("auto") == "torch"


def test_the_fast_path_needs_neither_reference_nor_triton():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['effattn.kernels.flash.reference'] "
        "= None\n"
        "import torch, effattn.registry as r; x = torch.randn(1, 1, 4, 8); r.backend('dense')(x, "
        "x, x)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
