"""The bandwidth kernels touch everything they claim to, at every length; in the interpreter where
there is no GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")

from effattn.kernels import bandwidth  # noqa: E402
from effattn.kernels.bandwidth import triton_impl  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = triton_impl.TILE["BLOCK"]
LENGTHS = (1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7, 37 * BLOCK)
IMPLS = pytest.mark.parametrize("impl", ["auto", "torch", "triton"])


def framed(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A vector, and the larger one that it lies in: nothing around it may change."""
    whole = torch.full((length + 2 * BLOCK,), -7.0, device=DEVICE)
    return whole[BLOCK : BLOCK + length], whole


@IMPLS
@pytest.mark.parametrize("length", LENGTHS)
def test_copy_and_write_touch_all_of_it_and_nothing_else(length, impl):
    source = torch.randn(length, device=DEVICE)
    out, whole = framed(length)
    bandwidth.copy(source, out, impl)
    assert torch.equal(out, source)
    bandwidth.write(out, 2.5, impl)
    assert torch.equal(out, torch.full_like(source, 2.5))
    assert torch.equal(whole[:BLOCK], torch.full_like(whole[:BLOCK], -7.0))
    assert torch.equal(whole[BLOCK + length :], torch.full_like(whole[BLOCK + length :], -7.0))


@IMPLS
@pytest.mark.parametrize("length", LENGTHS)
def test_read_reads_every_element_once(length, impl):
    """Whole numbers whose sum float32 holds exactly: one left out or read twice is seen."""
    source, _ = framed(length)
    source.copy_(torch.randint(1, 50, (length,)))
    assert float(bandwidth.read(source, impl).double().sum()) == float(source.double().sum())


@IMPLS
def test_launch_runs(impl):
    bandwidth.launch(DEVICE, impl)
    bandwidth.launch(torch.device(DEVICE), impl)


def test_bad_input():
    x = torch.ones(8)
    for bad, got in (
        (x.double(), "float64"),
        (x.view(2, 4), r"\(2, 4\)"),
        (x[::2], "strided"),
        (x[:0], r"\(0,\)"),
    ):
        with pytest.raises(
            ValueError, match=f"source: got .*{got}.*valid is a contiguous float32 vector"
        ):
            bandwidth.read(bad)
    with pytest.raises(ValueError, match=r"out: got \(4,\) on cpu, valid is \(8,\) on cpu"):
        bandwidth.copy(x, x[:4])
    with pytest.raises(
        ValueError, match="impl: got 'reference', valid are 'auto', 'torch', 'triton'"
    ):
        bandwidth.write(x, 0.0, impl="reference")
