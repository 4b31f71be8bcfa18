"""Second derivatives are refused wherever a kernel has none, also where the incoming gradient is a
constant: a penalty on a gradient loses nothing silently."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import effattn

SPECS = [
    "sliding(window=5, sinks=2)",
    "strided(stride=4)",
    "topk(window=5, block=3, blocks=2)",
    "linear",
    "lsh(rounds=2, buckets=4, chunk=4)",
    "vq(codes=12, block=8)",
]


def penalty(attn, x: torch.Tensor, weigh) -> torch.Tensor:
    """The square of the gradient of what attention gives, for x of (3, B, H, T, D)."""
    loss = weigh(attn(*x.unbind(), causal=True))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return gradient.square().sum()


@pytest.mark.parametrize("weigh", [torch.sum, lambda out: out.square().sum()])
@pytest.mark.parametrize("spec", SPECS)
def test_a_second_derivative_is_refused(spec, weigh):
    attn = effattn.backend(spec).double()
    x = torch.randn(3, 1, 2, 13, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        penalty(attn, x, weigh).backward()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(penalty(attn, x, weigh), x, allow_unused=True)
    assert penalty(attn, x, weigh) > 0  # the first derivatives are there


def test_the_gated_scan_has_one():
    attn = effattn.backend("gated(delta=True, gate='feature', decay=0.7)").double()
    x = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: penalty(attn, x, torch.sum), x)


def test_no_kernel_leaves_it_to_torch():
    """Whose `once_differentiable` lets constants through."""
    folder = Path(effattn.kernels.once.__file__).parent
    for file in folder.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "autograd.function import once" not in text, file
        if file.name not in ("once.py", "learning.py"):  # what passes gradients on as they are
            functions = len(re.findall(r"\(torch\.autograd\.Function\)", text))
            assert functions == text.count("@once_differentiable"), file
