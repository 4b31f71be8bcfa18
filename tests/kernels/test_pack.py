"""Packing: the same bits everywhere, the proven bound, and nothing that depends on what comes
later.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn.kernels.pack import AXES, KINDS, Codes, Coding, Pages, concatenate, pack, unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODINGS = [
    Coding(kind, axis, 16, symmetric)
    for kind, axis, symmetric in itertools.product(KINDS, AXES, (False, True))
    if kind != "fp8" or symmetric
]


def awkward(tokens=32, dim=32, heads=2):
    """Groups of zeros, of one number, tiny ones and huge ones, outlier channels with an offset."""
    x = torch.randn(1, heads, tokens, dim, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1, 1e-3, 300.0, 1e30]).repeat(dim // 4) + torch.tensor(
        [0, 0, 900.0, 0]
    ).repeat(dim // 4)
    x[0, 0, :16, :16] = 0
    x[0, 1, :16, :16] = 300.123
    x[0, 1, 16:, 16:] *= 1e-35
    return x


def along(coding, x, reduce):
    """`reduce` over each group, back at every number's place."""
    axis = 2 if coding.axis == "channel" else 3
    return reduce(x.unflatten(axis, (-1, coding.group)), axis + 1).repeat_interleave(
        coding.group, axis
    )


@pytest.mark.parametrize(
    ("coding", "impl"),
    [(coding, "torch") for coding in CODINGS] + [(coding, "triton") for coding in CODINGS[::2]],
    ids=str,
)
def test_all_implementations_give_the_same_bits(coding, impl):
    if impl == "triton":
        pytest.importorskip("triton")
    x = awkward()
    want, got = pack(x, coding, "reference"), pack(x.to(DEVICE), coding, impl)
    for a, b in zip(want.tensors(), got.tensors(), strict=True):
        assert torch.equal(a, b.cpu())
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(unpack(want, dtype, "reference"), unpack(got, dtype, impl).cpu())


def test_strides_and_sizes_that_fill_no_tile():
    pytest.importorskip("triton")
    # (2, 2, 48, 24), tokens first in memory
    x = torch.randn(2, 48, 2, 40).transpose(1, 2)[..., :24].to(DEVICE)
    for coding in (Coding("int4", "channel", 48), Coding("int2", "token", 6)):
        want = pack(x.cpu(), coding, "torch")
        got = pack(x, coding, "triton")
        assert all(
            torch.equal(a, b.cpu()) for a, b in zip(want.tensors(), got.tensors(), strict=True)
        )
        part = got[0:48].map(lambda t: t[1:, ::2])
        assert torch.equal(unpack(part, impl="triton").cpu(), unpack(want, impl="torch")[1:, ::2])


@settings(max_examples=60, deadline=None)
@given(
    coding=st.sampled_from(CODINGS),
    size=st.floats(-30, 30),
    offset=st.sampled_from([0.0, 1.0, -30.0, 1e4]),
    outlier=st.sampled_from([0.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_no_number_is_further_than_half_a_step(coding, size, offset, outlier, seed):
    """The bound that `reference.py` proves, for groups of any size and offset; fp8: half of its
    last digit.
    """
    x = torch.randn(1, 1, 32, 16, generator=torch.Generator().manual_seed(seed)) + offset
    x[0, 0, 3, 5] += outlier
    x = x * 10.0**size
    packed = pack(x, coding, "torch")
    off = (unpack(packed, torch.float64, "torch") - x.double()).abs()
    scale = along(coding, x, lambda g, dim: g.amax(dim) * 0)  # the right shape
    axis = 2 if coding.axis == "channel" else 3
    scale = packed.scale.double().repeat_interleave(coding.group, axis).view(scale.shape)
    most = along(coding, x.double().abs(), torch.amax)
    if coding.kind == "fp8":
        bound = torch.maximum(x.double().abs() * 2**-4, scale * 2**-10)
    else:
        bound = scale / 2
        widest = (
            most
            if coding.symmetric
            else along(coding, x.double(), torch.amax) - along(coding, x.double(), torch.amin)
        )
        ideal = widest / 2**coding.bits * (2 if coding.symmetric else 1)
        floor = most * 2**-15
        assert (
            scale
            <= torch.maximum(ideal * (1 + 2**-7) + most * 2**-9, floor * (1 + 2**-7)) + 2**-110
        ).all()
    assert (off <= bound + most * 2**-22 + scale * 2**-15).all()


def test_packing_in_parts_is_packing_at_once():
    x = awkward(64)
    for coding in CODINGS:
        whole = pack(x, coding, "torch")
        parts = [pack(x[:, :, n : n + 16], coding, "torch") for n in range(0, 64, 16)]
        room = Codes.empty(coding, 1, 2, 64, 32)
        for n, part in enumerate(parts):
            room.put(16 * n if n % 2 else torch.tensor(16 * n), part)
        for got in (concatenate(parts), room, concatenate([whole[:32], whole[32:]])):
            assert all(
                torch.equal(a, b) for a, b in zip(whole.tensors(), got.tensors(), strict=True)
            )
        assert whole.nbytes == 2 * coding.nbytes(64, 32)
        assert whole.shape == x.shape


def test_a_later_outlier_saturates_nothing():
    x = torch.randn(1, 1, 64, 16)
    x[:, :, 50] *= 1000
    for coding in CODINGS:
        before, after = unpack(pack(x, coding))[:, :, :32], unpack(pack(x[:, :, :32], coding))
        assert torch.equal(before, after)
        assert unpack(pack(x, coding)).abs().max() > 0.6 * x.abs().max()


def test_what_is_not_finite_stays_in_its_group():
    for impl in ("torch", "triton"):
        x = torch.randn(1, 1, 32, 16, device=DEVICE)
        x[0, 0, 20, 3] = torch.nan
        out = unpack(pack(x, Coding("int4", "channel", 16), impl), impl=impl)
        assert out[0, 0, 16:, 3].isnan().all()
        assert out.isnan().sum() == 16


def test_what_does_not_fit_is_said():
    x = torch.zeros(1, 1, 20, 32)
    with pytest.raises(ValueError, match="got 20 tokens, valid are multiples of 16"):
        pack(x, Coding("int4", "channel", 16))
    with pytest.raises(
        ValueError, match="got head dimension 32; valid groups are 1, 2, 4, 8, 16, 32"
    ):
        pack(x, Coding("int4", "token", 12))
    with pytest.raises(ValueError, match=r"kind: got 'int3' \(did you mean"):
        Coding("int3")
    codes = pack(torch.zeros(1, 1, 32, 32), Coding("int4", "channel", 16))
    with pytest.raises(ValueError, match="multiples of 16"):
        codes[8:16]
    with pytest.raises(ValueError, match="do not fit"):
        codes.put(16, codes)


@pytest.mark.parametrize(
    "coding", [Coding("int4", "channel", 16), Coding("fp8", "token", 16)], ids=str
)
def test_pages_are_cut_as_one_tensor_is(coding):
    whole = pack(awkward(tokens=96), coding)
    pages = Pages([whole[:32], whole[32:48], whole[48:]])
    assert (pages.shape, pages.tokens, pages.nbytes, pages.coding) == (
        whole.shape,
        96,
        whole.nbytes,
        coding,
    )
    for start, stop in (
        (0, 96),
        (0, 32),
        (16, 64),
        (48, 96),
        (80, 96),
        (32, 32),
    ):
        part, want = pages[start:stop], whole[start:stop]
        assert part.tokens == stop - start
        for got, right in zip(concatenate(part.parts).tensors(), want.tensors(), strict=True):
            assert torch.equal(got, right)
        assert torch.equal(part.scale, want.scale)
        assert part.zero is want.zero is None or torch.equal(part.zero, want.zero)
    if coding.unit > 1:
        with pytest.raises(ValueError, match="multiples of 16"):
            pages[0:40]
