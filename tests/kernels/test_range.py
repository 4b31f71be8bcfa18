"""Finite for anything finite: queries and keys of hundreds a dimension, and of nearly nothing.

A normalised method averages values: of values that are all 1 it gives 1, which tells an underflow
(0), an overflow and a wrong normaliser apart."""

from itertools import pairwise

import pytest
import torch

import effattn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FEATURES = (
    "linear",
    "linear(feature_map='softmax')",
    "linear(feature_map='hedgehog')",
    "linear(feature_map='exp')",
    "linear(feature_map='softmax', decay=0.5)",
    "performer(features=32)",
    "gated(feature_map='exp', decay=0.9)",
    "hybrid(window=4, sinks=1)",
    "performer(features=32, kernel='relu')",
)
MAY_SEE_NOTHING = ("linear(feature_map='relu')", "linear(feature_map='relu2')")
SOFTMAX = (
    "dense",
    "sliding(window=5, sinks=1)",
    "longformer(window=5, global_tokens=2)",
    "strided(stride=4)",
    "fixed(stride=4)",
    "longnet(segments=[4, 12], dilations=[1, 3])",
    "linformer(k=4, max_length=64)",
    "linformer_blockwise(k=16, max_length=64, block=8)",
    "lsh(chunk=4, buckets=4)",
    "topk(window=4, block=4, blocks=2)",
    "vq(codes=8, block=8)",
)
SIZES = (1e-30, 1e-12, 1e-7, 1.0, 16.0, 100.0, 1000.0)


def draw(sizes, dtype, tokens, dim):
    """Rows of the batch: queries and keys of each size, and the same but all negative."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=generator) for heads in (4, 2, 2))
    sizes = torch.tensor(sizes)[:, None, None, None]
    q, k = (torch.cat([x * sizes, -x.abs() * sizes]) for x in (q, k))
    return [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v.expand(len(q), -1, -1, -1))]


def averages(spec, impl, dtype, sizes=SIZES, tokens=40, dim=32):
    """Outputs for values of 1, whole and in steps, in each direction; all else is asserted to be
    finite.
    """
    attn = effattn.backend(spec, impl=impl)
    only = "sinks" in spec or "decay" in spec
    for causal in (True, False):
        if not getattr(attn.traits, "causal" if causal else "bidirectional") or (
            only and not causal
        ):
            continue
        q, k, v = draw(sizes, dtype, tokens, dim)
        out = attn(q, k, v, causal=causal)
        grads = torch.autograd.grad(
            out.float().sin().sum(),
            (q, k, v),
            materialize_grads=True,
        )
        for name, x in zip(("output", "dq", "dk", "dv"), (out, *grads), strict=True):
            finite = x.isfinite().flatten(1).all(dim=1).tolist()
            assert all(finite), f"{name}, causal {causal}: {finite} of sizes {sizes}"
        with torch.no_grad():
            ones = torch.ones_like(v)
            yield attn(q, k, ones, causal=causal)
            if causal:
                state, at = attn.new_state(), (0, tokens // 2, tokens - 1, tokens)
                parts = [[x[:, :, a:b] for x in (q, k, ones)] for a, b in pairwise(at)]
                yield torch.cat([attn(*part, state=state) for part in parts], dim=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", FEATURES)
def test_features(spec, dtype):
    for out in averages(spec, "torch", dtype):
        assert (out - 1).abs().max() < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", MAY_SEE_NOTHING)
def test_features_that_may_be_zero(spec, dtype):
    # 1 / 1e-7, which is the slope there, is infinite in fp16
    sizes = SIZES if dtype != torch.float16 else SIZES[3:]
    for out in averages(spec, "torch", dtype, sizes):
        assert (((out - 1).abs() < ROUNDING[dtype]) | (out == 0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SOFTMAX)
def test_softmax_patterns(spec, dtype):
    for out in averages(spec, "torch", dtype, sizes=(1e-30, 16.0, 1000.0)):
        assert out.isfinite().all()
        if "linformer" not in spec:  # its values are projected
            assert (out - 1).abs().max() < ROUNDING[dtype]


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        ("linear", torch.float16),
        ("linear(feature_map='softmax')", torch.float16),
        ("linear(feature_map='hedgehog')", torch.bfloat16),
        ("performer(features=32)", torch.float32),
        ("performer(features=32)", torch.float16),
    ],
)
def test_features_on_triton(spec, dtype):
    """Features of fp16 inputs are multiplied in bf16, whose range they need: that is the rounding
    of two factors.
    """
    budget = 2 * ROUNDING[torch.bfloat16 if dtype == torch.float16 else dtype]
    for out in averages(spec, "triton", dtype, sizes=(100.0,), tokens=5, dim=16):
        assert (out - 1).abs().max() < budget


@pytest.mark.parametrize(("feature_map", "size"), [("elu", 8.0), ("softmax", 3.0)])
def test_large_keys_still_weigh_what_they_should(feature_map, size):
    """Nothing ends before an exponent of -30 does."""
    attn = effattn.backend("linear", feature_map=feature_map, impl="torch")
    truth = effattn.backend("linear", feature_map=feature_map, impl="reference")
    q, k, v = (x.detach() for x in draw((size,), torch.float32, 70, 32))
    torch.testing.assert_close(
        attn(q, k, v).double(), truth(q.double(), k.double(), v.double()), atol=1e-4, rtol=1e-4
    )
