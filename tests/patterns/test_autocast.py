"""`backward()` inside autocast gives the gradients of one that is called outside."""

from __future__ import annotations

import pytest
import torch

import effattn

SPECS = (
    "dense",
    "linear",
    "performer(features=8)",
    "lsh(rounds=2, buckets=4, chunk=8)",
    "topk(window=4, block=4, blocks=2)",
    "vq(codes=8)",
)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_inside_autocast(spec):
    torch.manual_seed(0)
    attn = effattn.backend(spec, impl="torch")
    qkv = [torch.randn(2, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2)]
    grad = torch.randn(2, 4, 16, 8)
    for causal in (True, False) if attn.traits.bidirectional else (True,):
        expected = torch.autograd.grad(attn(*qkv, causal=causal), qkv, grad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = torch.autograd.grad(attn(*qkv, causal=causal), qkv, grad)
        torch.testing.assert_close(got, expected)
