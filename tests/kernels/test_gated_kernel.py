"""Gated linear attention and the gated delta rule: chunks against the definition, in fp64, forward
and backward; and what a kernel of them must survive."""

import pytest
import torch
from torch.nn.functional import normalize

from effattn.kernels import gated
from effattn.kernels.gated import torch_impl
from effattn.kernels.gated.reference import attention as definition

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = [(gate, delta) for gate in (None, "head", "feature") for delta in (False, True)]


def given(gate, delta, tokens, queries=None, dtype=torch.float64, strength=3.0, seed=0):
    """q, k, v and the options of a call, with gates of all strengths."""
    draw = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(2, *shape, generator=draw, dtype=torch.float64)  # noqa: E731
    q, k, v = new(4, queries or tokens, 8), new(2, tokens, 8), new(2, tokens, 6)
    options = {"scale": 0.3, "normalize": not delta}
    if not delta:  # or the denominator may vanish
        q, k = q.abs(), k.abs()
    else:
        k = normalize(k, dim=-1)
        options["beta"] = new(2, tokens).sigmoid()
    if gate is not None:
        width = 8 if gate == "feature" else 1
        options["log_decay"] = gated.LOWEST * (strength * new(2, tokens, width)).sigmoid()
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[1, : tokens // 3] = False
    options = {name: x.to(dtype) if torch.is_tensor(x) else x for name, x in options.items()}
    return [x.to(dtype) for x in (q, k, v)], options | {"mask": mask}


def on_device(tensors, options):
    return [x.to(DEVICE) for x in tensors], {
        name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in options.items()
    }


@pytest.mark.parametrize(("gate", "delta"), RULES)
@pytest.mark.parametrize(("queries", "tokens"), [(150, 150), (3, 150), (1, 31), (5, 5), (70, 70)])
def test_chunks_are_the_definition_forward_and_backward(gate, delta, queries, tokens):
    tensors, options = given(gate, delta, tokens, queries)
    leaves = [
        *tensors,
        *(x for x in options.values() if torch.is_tensor(x) and x.is_floating_point()),
    ]
    for x in leaves:
        x.requires_grad_()
    got, _ = gated.attention(*tensors, impl="torch", **options)
    expected = definition(*tensors, **options)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    ours, truth = (
        torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
        for out in (got, expected)
    )
    for mine, theirs in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("gate", "delta"), [("head", True), ("feature", False)])
def test_segments_are_one_sequence(gate, delta, monkeypatch):
    """With gradients a segment's products are made again."""
    monkeypatch.setattr(torch_impl, "SEGMENT", 32)
    tensors, options = given(gate, delta, 100, 90)
    for x in tensors:
        x.requires_grad_()
    got, _ = gated.attention(*tensors, impl="torch", **options)
    expected = definition(*tensors, **options)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    for mine, theirs in zip(
        *(torch.autograd.grad(out.sin().sum(), tensors) for out in (got, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("gate", "delta"), RULES)
def test_a_memory_goes_on_at_any_cut(gate, delta):
    (q, k, v), options = given(gate, delta, 40)
    whole, last = gated.attention(q, k, v, keep=True, impl="torch", **options)
    mask, memory, outs, at = options.pop("mask"), None, [], 0
    for size in (1, 15, 17, 7):
        part = slice(at, at + size)
        at += size
        own = {name: x[:, :, part] if torch.is_tensor(x) else x for name, x in options.items()} | {
            "mask": mask[:, part]
        }
        out, memory = gated.attention(
            q[:, :, part],
            k[:, :, part],
            v[:, :, part],
            memory=memory,
            keep=True,
            impl="torch",
            **own,
        )
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=2), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(memory.sums, last.sums, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("gate", "delta"), [("head", False), ("feature", False), ("feature", True)]
)
@pytest.mark.parametrize("strength", [0.0, 1e4])
def test_the_strongest_gates_stay_finite_and_right(gate, delta, strength):
    """Every step keeps e^-5 or all; features of a thousand, in fp32."""
    tensors, options = given(gate, delta, 200, dtype=torch.float32, strength=strength)
    if not delta:
        tensors[:2] = [1e3 * x for x in tensors[:2]]
    for x in tensors:
        x.requires_grad_()
    out, _ = gated.attention(*tensors, impl="torch", **options)
    grads = torch.autograd.grad(out.square().mean(), tensors)
    assert all(torch.isfinite(x).all() for x in (out, *grads))
    wide = {n: x.double() if n in ("log_decay", "beta") else x for n, x in options.items()}
    expected = definition(*(x.detach().double() for x in tensors), **wide)
    error = (out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 5e-6


def test_equal_keys_are_overwritten_by_the_delta_rule():
    """With beta 1 the last value written for a key is what is read, whatever was there before."""
    key = torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 1, 0]), 4).double()[None, None]
    value = torch.arange(5.0, dtype=torch.float64)[None, None, :, None]
    out, _ = gated.attention(key, key, value, beta=torch.ones(1, 1, 5).double(), impl="torch")
    assert out.flatten().tolist() == [0, 1, 2, 3, 4]
    out, _ = gated.attention(
        key.roll(1, 2), key, value, beta=torch.ones(1, 1, 5).double(), impl="torch"
    )
    assert out.flatten().tolist() == [0, 0, 1, 2, 3]


@pytest.mark.interpreted
@pytest.mark.parametrize(("gate", "delta"), RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_is_the_definition(gate, delta, dtype):
    tensors, options = on_device(*given(gate, delta, 37, 30, dtype=torch.float32))
    tensors = [x.to(dtype) for x in tensors]
    half = {n: x[:, :, :20] if torch.is_tensor(x) and x.ndim > 2 else x for n, x in options.items()}
    half["mask"] = options["mask"][:, :20]
    rest = {n: x[:, :, 20:] if torch.is_tensor(x) and x.ndim > 2 else x for n, x in options.items()}
    rest["mask"] = options["mask"][:, 20:]
    q, k, v = tensors
    _, memory = gated.attention(
        q[:, :, :13], k[:, :, :20], v[:, :, :20], keep=True, impl="triton", **half
    )
    got, after = gated.attention(
        q[:, :, 13:], k[:, :, 20:], v[:, :, 20:], memory=memory, keep=True, impl="triton", **rest
    )
    wide = {n: x.double() if n in ("log_decay", "beta") else x for n, x in options.items()}
    expected = definition(*(x.double() for x in tensors), **wide)[:, :, 13:]
    error = (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < (2e-6 if dtype == torch.float32 else 1.2e-2)
    assert torch.isfinite(after.sums).all()


@pytest.mark.interpreted
def test_triton_gradients_are_those_of_the_torch_path():
    tensors, options = on_device(*given("feature", True, 37, dtype=torch.float32))
    found = {}
    for impl in ("triton", "torch"):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        gates = {n: options[n].clone().requires_grad_() for n in ("log_decay", "beta")}
        out, memory = gated.attention(*leaves, keep=True, impl=impl, **options | gates)
        loss = out.sin().sum() + memory.sums.square().sum()
        found[impl] = torch.autograd.grad(loss, [*leaves, *gates.values()])
    for ours, truth in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
