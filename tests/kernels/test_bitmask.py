"""A bitmask's weights: packed exactly wherever the zeros are, and multiplied as the dense weight
is.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear as dense_product

from effattn.kernels import bitmask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sparse(rows, columns, dtype=torch.float32, seed=0, share=0.6):
    """A random matrix with that share of zeros; its first row has none, its last nothing else."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    gone = torch.rand(weight.shape, generator=draw) < share
    gone[0] = False
    gone[-1] = True
    return weight.masked_fill(gone, 0.0).to(DEVICE, dtype)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(2, 9),
    width=st.sampled_from([1, 2, 7, 63, 64, 65, 128, 131]),
    share=st.sampled_from([0.55, 0.8, 1.0]),
    seed=st.integers(0, 99),
)
def test_packing_is_exact(rows, width, share, seed):
    for dtype in (torch.float64, torch.bfloat16):
        weight = sparse(rows, 8 * width, dtype, seed, share)
        count = int(weight.count_nonzero())
        size = bitmask.packed_bytes(*weight.shape, count, dtype.itemsize)
        if size >= weight.nbytes:
            with pytest.raises(ValueError, match="of it are zeros"):
                bitmask.pack(weight)
            continue
        packed = bitmask.pack(weight)
        assert torch.equal(bitmask.unpack(packed), weight)
        assert packed.nbytes == size
        assert packed.shape == weight.shape
        assert torch.equal(packed.values, weight[weight != 0])
        bitmask.check(packed)


def test_where_the_bits_are():
    """As the layout says, column by column, two segments of which the second is short."""
    inputs = 512 + 24
    weight = torch.zeros(3, inputs)
    for column in (0, 1, 63, 64, 200, 511, 512, 514, 515, 535):
        one = weight.index_fill(1, torch.tensor([column]), 1.0)
        masks = bitmask.pack(one).masks[0]
        segment, inside = divmod(column, 512)
        wide = 64 if segment == 0 else 3
        expected = torch.zeros(inputs // 8, dtype=torch.uint8)
        expected[64 * segment + inside % wide] = 1 << inside // wide
        assert torch.equal(masks, expected), column


def test_half_of_the_weights_take_nine_sixteenths():
    weight = torch.ones(64, 4096, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    packed = bitmask.pack(weight)
    assert packed.nbytes == weight.nbytes * 9 // 16 + packed.starts.nbytes
    assert packed.starts.nbytes == weight.nbytes // 256


def test_a_matrix_of_zeros():
    packed = bitmask.pack(torch.zeros(8, 64, device=DEVICE))
    bitmask.check(packed)
    assert packed.values.numel() == 1
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    for impl in ("torch", "triton", "reference"):
        y = bitmask.linear(x, packed, impl=impl)
        assert not y.any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(impl, dtype, monkeypatch):
    """Odd sizes, one split and several, few rows and many, with and without a bias, against the
    definition in fp64."""
    from effattn.kernels.bitmask import torch_impl, triton_impl

    torch.manual_seed(0)
    monkeypatch.setitem(torch_impl.BLOCK, "cpu", 5_000)
    monkeypatch.setattr(triton_impl, "FEW_ROWS", 20)
    for rows, outputs, inputs, waves in (
        (1, 19, 1048, 4),
        (5, 33, 72, 0),
        (16, 18, 1056, 4),
        (21, 35, 264, 4),
    ):
        monkeypatch.setattr(triton_impl, "WAVES", waves)
        triton_impl.tile.cache_clear()
        packed = bitmask.pack(sparse(outputs, inputs, dtype))
        x = torch.randn(rows, inputs, device=DEVICE).to(dtype)
        bias = torch.randn(outputs, device=DEVICE).to(dtype)
        exact = packed._replace(values=packed.values.double())
        expected = bitmask.linear(x.double(), exact, bias.double(), impl="reference")
        for b in (bias, None):
            wanted = expected if b is not None else expected - bias.double()
            plain = dense_product(x, bitmask.unpack(packed), b).double() - wanted
            error = bitmask.linear(x, packed, b, impl=impl).double() - wanted
            assert error.norm() <= 2 * plain.norm() + 1e-6 * wanted.norm()
    triton_impl.tile.cache_clear()


def test_torch_in_fp64_is_the_definition():
    packed = bitmask.pack(sparse(21, 536, torch.float64))
    x = torch.randn(2, 536, dtype=torch.float64, device=DEVICE)
    ours = (bitmask.linear(x, packed, impl=impl) for impl in ("torch", "reference"))
    torch.testing.assert_close(*ours, rtol=1e-13, atol=1e-13)


def test_rows_are_unpacked_without_waiting_as_with(monkeypatch):
    """What GPUs and graphs do, where no number of the starts may be asked for."""
    from effattn.kernels.bitmask import torch_impl

    for share in (0.6, 1.0):
        weight = sparse(9, 544, share=share)
        weight[0] = 0
        packed = bitmask.pack(weight)
        one = torch_impl.block(packed, slice(2, 7))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        other = torch_impl.block(packed, slice(2, 7))
        monkeypatch.undo()
        assert torch.equal(one, weight[2:7])
        assert torch.equal(other, weight[2:7])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients(impl):
    """Of x and the bias, as the dense product's."""
    torch.manual_seed(0)
    weight = sparse(24, 560)
    packed = bitmask.pack(weight)
    x = torch.randn(3, 2, 560, device=DEVICE, requires_grad=True)
    bias = torch.randn(24, device=DEVICE, requires_grad=True)
    g = torch.randn(3, 2, 24, device=DEVICE)
    ours = torch.autograd.grad(bitmask.linear(x, packed, bias, impl=impl), (x, bias), g)
    true = torch.autograd.grad(dense_product(x, weight, bias), (x, bias), g)
    for mine, one in zip(ours, true, strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    packed = bitmask.pack(sparse(6, 24, torch.float64, share=0.8))
    x = torch.randn(2, 24, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: bitmask.linear(y, packed, impl="torch"), x)


def test_bad_input():
    with pytest.raises(ValueError, match="multiple of 8"):
        bitmask.pack(torch.zeros(4, 12))
    weight = torch.ones(16, 512, dtype=torch.bfloat16)
    weight[:, :30] = 0
    said = r"it takes 16,512 bytes, dense 16,384: 5.9% of it are zeros, above 6.6% pay"
    with pytest.raises(ValueError, match=said):
        bitmask.pack(weight)
    packed = bitmask.pack(sparse(8, 64))
    with pytest.raises(ValueError, match=r"expected \(..., 64\) torch.float32"):
        bitmask.linear(torch.zeros(2, 63, device=DEVICE), packed)


@pytest.mark.parametrize("part", ["starts", "masks", "values"])
def test_parts_that_do_not_fit_are_found(part):
    packed = bitmask.pack(sparse(8, 64))
    wrong = {
        "starts": packed.starts + 1,
        "masks": packed.masks ^ (torch.arange(8, device=DEVICE) == 3).byte()[:, None],
        "values": packed.values[:-1],
    }
    with pytest.raises(ValueError, match=r"starts: they do not fit|values: got"):
        bitmask.check(packed._replace(**{part: wrong[part]}))
