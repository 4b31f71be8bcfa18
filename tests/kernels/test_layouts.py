"""Where numbers lie changes nothing: every kernel's own entry, on views with the same numbers as
their copies.

Backends are held to it by `effattn.conformance` (property `layouts`).
"""

import pytest
import torch

from effattn.conformance.layouts import every_third, heads_expanded, tokens_overlapping, transposed
from effattn.kernels import decode, flash, linear, linformer, monarch, pack, vq
from effattn.kernels.flash import Blocks, Layout, Window
from effattn.kernels.rows import dense_rows

IMPLS = ("torch", "triton")
CHANGES = (transposed, every_third, tokens_overlapping, heads_expanded)
# the interpreter is slow
RUNS = [("torch", change) for change in CHANGES] + [("triton", transposed)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# other kernels for other strides: their rounding
BUDGET = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same(run, *views, dtype=torch.float32, gradients=True):
    """`run` of views and of their copies: outputs and gradients agree."""
    found = []
    for given in (views, [x.clone(memory_format=torch.contiguous_format) for x in views]):
        leaves = [x.detach().requires_grad_(gradients) for x in given]
        outs = run(*leaves)
        outs = list(outs) if isinstance(outs, tuple) else [outs]
        if gradients:
            loss = sum((x.float().sin() * draw(*x.shape, seed=9)).sum() for x in outs)
            outs += torch.autograd.grad(loss, leaves)
        found.append(outs)
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=BUDGET[dtype], rtol=BUDGET[dtype])


@pytest.mark.parametrize(("impl", "change"), RUNS)
@pytest.mark.parametrize(
    "pattern", [None, Window(5), Blocks(size=4)], ids=("dense", "window", "blocks")
)
def test_flash(pattern, impl, change):
    q, k, v = (change(draw(2, heads, 9, 16, seed=n)) for n, heads in enumerate((4, 2, 2)))
    same(lambda *x: flash.attention(*x, pattern, impl=impl, lse=True), q, k, v)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", BUDGET, ids=("float32", "bfloat16"))
@pytest.mark.parametrize(
    "pattern", [None, Window(back=13), Window(back=13, first=2), Blocks(size=40)], ids=str
)
def test_flash_in_many_tiles(pattern, dtype, change):
    """More than 128 queries go tile by tile, and bf16 through other products from some size on."""
    q, k, v = (
        change(draw(1, heads, 200, 32, seed=n, dtype=dtype)) for n, heads in enumerate((4, 2, 2))
    )
    same(lambda *x: flash.attention(*x, pattern, impl="torch"), q, k, v, dtype=dtype)


def test_tokens_that_are_all_the_same_memory():
    q, k, v = (
        draw(1, 2, 1, 32, seed=n, dtype=torch.bfloat16).expand(-1, -1, 60, -1) for n in range(3)
    )
    out = flash.attention(q.clone().requires_grad_(), k, v, Window(back=9), impl="torch")
    torch.testing.assert_close(out.detach(), v)
    out.sum().backward()


@pytest.mark.parametrize(("impl", "change"), RUNS)
@pytest.mark.parametrize("queries", [1, 3])
def test_decode(queries, impl, change):
    q, k, v = (
        change(draw(2, h, t, 16, seed=h + t))
        for h, t in (
            (4, queries),
            (2, 9),
            (2, 9),
        )
    )
    mask = torch.ones(2, 18, dtype=torch.bool, device=DEVICE)
    mask[1, :6] = False
    layout = Layout(mask=mask[:, ::2])  # a view as well
    same(
        lambda *x: decode.attention(*x, Window(5), layout, impl=impl, lse=True),
        q,
        k,
        v,
        gradients=False,
    )


@pytest.mark.parametrize(("impl", "change"), RUNS)
@pytest.mark.parametrize("feature_map", ["elu", "favor"])
def test_linear(feature_map, impl, change):
    q, k, v = (change(draw(2, heads, 9, 16, seed=n)) for n, heads in enumerate((4, 2, 2)))
    options = {"directions": draw(8, 16, seed=5), "scale": 0.25} if feature_map == "favor" else {}
    same(lambda *x: linear.attention(*x, feature_map, impl=impl, **options)[0], q, k, v)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_memory_of_views(impl):
    """What torch keeps is a part of a wider tensor; Triton goes on with it."""
    q, k, v = (draw(2, 2, 9, 16, seed=n) for n in range(3))
    _, memory = linear.attention(q, k, v, "elu", keep=True, impl="torch")
    views = linear.Memory(transposed(memory.sums), memory.norms.mT.contiguous().mT, None)
    copies = linear.Memory(*(x if x is None else x.contiguous() for x in memory))
    new = [x[:, :, :1] for x in (q, k, v)]
    outs = [
        linear.attention(*new, "elu", memory=memory, impl=impl)[0] for memory in (views, copies)
    ]
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize(("impl", "change"), RUNS)
def test_projections_along_time_and_codebooks(impl, change):
    x, weight = change(draw(2, 2, 9, 16)), draw(2, 4, 12, seed=3)
    same(lambda x: linformer.project(x, weight, impl=impl), x)
    q, codebook = change(draw(2, 4, 9, 16, seed=1)), draw(2, 6, 16, seed=4)
    codes = [vq.nearest(y, codebook, impl=impl) for y in (x, x.contiguous())]
    assert torch.equal(*codes)
    real = torch.rand(2, 18, generator=torch.Generator().manual_seed(0)).to(DEVICE)[:, ::2] > 0.3

    def run(q, v):
        sums, counts = vq.summarise(
            v,
            codes[0],
            words=6,
            real=real,
            size=4,
            impl=impl,
        )
        return vq.read(q, codebook, sums, counts, scale=0.25, size=4, impl=impl)

    same(run, q, x)


@pytest.mark.parametrize(("impl", "change"), RUNS)
def test_products_and_codes(impl, change):
    x = change(draw(2, 2, 9, 16))
    right, left = transposed(draw(4, 8, 4, seed=1)), every_third(draw(4, 4, 8, seed=2))
    same(
        lambda x, right, left: monarch.linear(x, right, left, draw(32)[::2], impl=impl),
        x,
        right,
        left,
    )
    packed = [
        pack.pack(y, pack.Coding("int4", axis="token", group=16), impl=impl)
        for y in (x, x.contiguous())
    ]
    assert torch.equal(packed[0].codes, packed[1].codes)


def test_rows_that_are_fine_are_not_copied():
    x = draw(2, 9, 4, 16).transpose(1, 2)  # transformers' order
    for fine in (
        x,
        x[:, :, 3:],
        x[:, :1].expand(-1, 4, -1, -1),
        x[..., 4:8],
        x[:, :, :1],
        draw(2, 9),
        None,
    ):
        assert dense_rows(fine) is fine
    for other in (x.mT, x[..., ::2], x[..., :1].expand_as(x), x[:, :, :1].expand_as(x)):
        assert dense_rows(other).is_contiguous()
        assert torch.equal(dense_rows(other), other)
