"""The Monarch product: torch and Triton (in its interpreter, without a GPU) against the paper's
four matrices.
"""

from __future__ import annotations

import math

import pytest
import torch

from effattn.kernels import monarch
from effattn.kernels.monarch import reference, triton_impl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# blocks rank p  s  inputs outputs: rank 1 and sqrt(n) blocks, odd everything, padding, one block,
# high rank
SIZES = [
    (4, 1, 4, 4, 16, 16),
    (3, 3, 20, 17, 58, 50),
    (4, 2, 5, 7, 18, 27),
    (1, 2, 6, 3, 6, 3),
    (2, 16, 24, 32, 48, 64),
]
NAMES = ("y", "x", "right", "left", "bias")


def tensors(size, rows, dtype=torch.float64, seed=0):
    """x, right, left, bias, with gradients; outputs of about 1."""
    b, r, p, s, inputs, outputs = size
    g = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(rows, inputs, generator=g),
        torch.randn(b, b * r, p, generator=g) / math.sqrt(p),
        torch.randn(b, s, b * r, generator=g) / math.sqrt(b * r),
        torch.randn(outputs, generator=g),
    ]
    return [x.to(DEVICE, dtype).requires_grad_() for x in made]


def run(impl, given, outputs, dtype=None):
    """y and the gradients of all four for one random cotangent."""
    given = [x.detach().to(dtype or x.dtype).requires_grad_() for x in given]
    y = monarch.linear(*given, out_features=outputs, impl=impl)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return (y, *torch.autograd.grad(y, given, g.to(y.dtype)))


def rms(x):
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


@pytest.mark.parametrize("size", SIZES)
def test_reference_is_the_definition_entry_by_entry(size):
    b, r, p, s, *_ = size
    _, right, left, _ = (x.detach() for x in tensors(size, 1))
    dense = reference.dense(right, left)
    assert dense.shape == (b * s, b * p)
    g = torch.Generator().manual_seed(0)
    for j, t, i, k in zip(
        *(torch.randint(n, (20,), generator=g).tolist() for n in (b, s, b, p)), strict=True
    ):
        entry = sum(left[j, t, i * r + a] * right[i, j * r + a, k] for a in range(r))
        assert torch.allclose(dense[t * b + j, i * p + k], entry)


def test_reference_is_the_papers_formula():
    """arXiv:2204.00595, equation 1, for n = m²: M[l·m + j, k·m + i] = L[j, l, k] R[k, j, i]."""
    _, right, left, _ = (x.detach() for x in tensors((4, 1, 4, 4, 16, 16), 1))
    expected = torch.einsum("jlk,kji->ljki", left, right).reshape(16, 16)
    assert torch.allclose(reference.dense(right, left), expected)


@pytest.mark.parametrize("rows", [0, 1, 5, 67])
@pytest.mark.parametrize("size", SIZES)
def test_torch_is_exact(size, rows):
    given = tensors(size, rows)
    for name, ours, theirs in zip(
        NAMES, run("torch", given, size[5]), run("reference", given, size[5]), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12), name


def test_torch_gradcheck():
    given = tensors(SIZES[2], 3)
    assert torch.autograd.gradcheck(
        lambda *x: monarch.linear(*x, out_features=27, impl="torch"), given
    )


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (torch.float32, 1),
        (torch.bfloat16, 5),
        (torch.bfloat16, 64),
        (torch.float16, 67),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", SIZES)
def test_triton_forward_and_backward(size, rows, dtype, monkeypatch):
    """No further from fp64 than twice torch in the same dtype; two launches below 64 rows, one from
    there on.
    """
    one_pass = []
    whole = triton_impl.in_one_pass
    monkeypatch.setattr(
        triton_impl, "in_one_pass", lambda *args: one_pass.append(1) or whole(*args)
    )
    given = tensors(size, rows, dtype)
    exact = run("reference", given, size[5], torch.float64)
    for name, ours, plain, true in zip(
        NAMES, run("triton", given, size[5]), run("torch", given, size[5]), exact, strict=True
    ):
        error, usual = rms(ours.double() - true), rms(plain.double() - true)
        assert ours.dtype == dtype
        assert error <= 2 * usual + torch.finfo(dtype).eps * rms(true) / 8, name
        assert error <= 0.01 * rms(true), name
    assert len(one_pass) == (rows >= 64)


@pytest.mark.parametrize("rows", [3, 65])
def test_triton_frozen_factors_need_no_intermediate_gradient(rows):
    """The gradient of x alone comes from the transposed product, in one pass as well; and each
    factor's alone.
    """
    given = tensors(SIZES[1], rows, torch.float32)
    wanted = run("reference", given, 50, torch.float64)[1:]
    for number in range(4):
        alone = [x.detach().requires_grad_(n == number) for n, x in enumerate(given)]
        y = monarch.linear(*alone, out_features=50, impl="triton")
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        (grad,) = torch.autograd.grad(y, alone[number], g)
        assert torch.allclose(grad.double(), wanted[number], rtol=1e-4, atol=1e-4), NAMES[
            number + 1
        ]


def test_too_large_for_one_pass_takes_two(monkeypatch):
    monkeypatch.setattr(triton_impl, "in_one_pass", None)  # would be called
    monkeypatch.setattr(triton_impl, "WIDEST", 16)
    given = tensors(SIZES[1], 64, torch.float32)
    y = monarch.linear(*given, out_features=50, impl="triton")
    assert torch.allclose(
        y.double(), run("reference", given, 50, torch.float64)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("rows", [5, 64])
def test_strided_rows_and_batches(impl, rows):
    """Rows of a wider tensor, a transposed input, and more dimensions give what copies give;
    neighbours may be NaN.
    """
    size = SIZES[2]
    x, right, left, bias = (t.detach() for t in tensors(size, rows, torch.float32))
    expected = monarch.linear(x, right, left, bias, out_features=27, impl="reference")
    wide = torch.full((rows, 40), float("nan"), device=DEVICE)
    wide[:, 9:27] = x
    for each in (wide[:, 9:27], x.T.contiguous().T, x.view(1, rows, 18)):
        y = monarch.linear(each, right, left, bias, out_features=27, impl=impl)
        assert y.shape == (*each.shape[:-1], 27)
        assert torch.allclose(y.view(rows, 27), expected, atol=1e-5)
    y = monarch.linear(x, right, left, impl=impl)
    assert y.shape == (rows, 28)
    assert torch.allclose(y[:, :27] + bias, expected, atol=1e-5)


def test_autocast_is_as_for_linear_layers():
    given = tensors(SIZES[2], 5, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = monarch.linear(*given, out_features=27)
    expected = monarch.linear(*(x.detach().bfloat16() for x in given), out_features=27)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in given)


def test_an_implementation_runs_or_raises(monkeypatch):
    given = tensors(SIZES[0], 2)
    with pytest.raises(ValueError, match="impl: got 'tritn', valid are 'auto', 'torch', 'triton'"):
        monarch.linear(*given, impl="tritn")
    with pytest.raises(
        ValueError, match="float16, bfloat16 and float32; impl='torch' takes float64"
    ):
        monarch.linear(*given, impl="triton")
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="'triton' needs a GPU"):
            monarch.linear(*given, impl="triton")
        assert monarch.choose("auto", "cpu") == "torch"


@pytest.mark.parametrize("shared", [64 * 1024, 227 * 1024])
def test_every_size_has_a_tile(shared):
    for size in (1, 16, 100, 256):
        for rank in (1, 3, 8, 64):
            for itemsize in (2, 4):
                tile = triton_impl.one_pass_tile(size, rank, itemsize, shared)
                assert tile["S"] >= size
                assert tile["A"] >= rank
                assert min(tile["C"] * tile["A"], tile["G"] * tile["A"], tile["M"], tile["K"]) >= 16
