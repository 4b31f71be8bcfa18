"""Linear attention's kernels against the definition: torch and Triton, forward and backward, whole
and in parts.
"""

import itertools

import pytest
import torch

from effattn.kernels import linear
from effattn.kernels.linear import (
    features,
    reference,
    tiles,
    torch_bidirectional,
    torch_causal,
    torch_impl,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAPS = tuple(linear.MAPS)


def inputs(
    tokens=37,
    heads=4,
    kv_heads=2,
    dim=8,
    value_dim=6,
    batch=3,
    dtype=torch.float64,
    queries=None,
    device="cpu",
):
    draw = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(batch, h, t, d, generator=draw, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for h, t, d in (
            (heads, queries or tokens, dim),
            (kv_heads, tokens, dim),
            (kv_heads, tokens, value_dim),
        )
    )
    return q, k, v


def options(name, dim=8, device="cpu"):
    if not linear.MAPS[name].directed:
        return {"scale": 0.3, "normalize": name != "identity"}
    draw = torch.Generator().manual_seed(0)
    return {"scale": 0.3, "directions": torch.randn(20, dim, generator=draw).to(device)}


def padding(batch, tokens, device="cpu"):
    mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    mask[-2, : tokens // 4], mask[-1, tokens // 2 :] = False, False
    return mask


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def compare(leaves, name, budget, impl, **call):
    """Output and gradients against the reference in fp64."""
    call = options(name, leaves[0].shape[-1], leaves[0].device) | call
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wide = {
        key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in call.items()
    }
    expected = reference.attention(*exact, name, **wide)
    got, _ = linear.attention(*leaves, name, impl=impl, **call)
    assert got.dtype == leaves[0].dtype
    assert relative(got, expected) < budget
    loss = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(got.device)
    ours = torch.autograd.grad(got, leaves, loss.to(got.dtype))
    for mine, true in zip(ours, torch.autograd.grad(expected, exact, loss), strict=True):
        assert relative(mine, true) < budget


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("causal", [True, False])
def test_torch_equals_the_definition(name, causal, monkeypatch):
    """Blocks of one chunk and of several, one batch row at a time and all, more keys than queries,
    padding.
    """
    for chunk, budget, queries, masked in itertools.product(
        (4, 64), (128, 1 << 18), (37, 6), (False, True)
    ):
        monkeypatch.setattr(torch_impl, "CHUNK", chunk)
        monkeypatch.setattr(torch_causal, "WHOLE", chunk)
        for module in (torch_causal, torch_bidirectional):
            monkeypatch.setattr(module, "BUDGET", {"cpu": budget})
        compare(
            inputs(queries=queries),
            name,
            1e-11,
            "torch",
            causal=causal,
            mask=padding(3, 37) if masked else None,
        )


@pytest.mark.parametrize("name", ["elu", "identity", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
def test_decay(name, normalize, monkeypatch):
    monkeypatch.setattr(torch_impl, "CHUNK", 8)
    if name == "identity" and normalize:
        return
    decay = torch.tensor([0.9, 0.5], dtype=torch.float64)
    for masked in (False, True):
        mask = padding(3, 37) if masked else None
        compare(inputs(), name, 1e-11, "torch", decay=decay, normalize=normalize, mask=mask)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(name, causal, monkeypatch):
    """First derivatives by finite differences, through the memory too."""
    monkeypatch.setattr(torch_impl, "CHUNK", 2)
    q, k, v = (x[..., :3].detach().requires_grad_() for x in inputs(5, 2, 1, batch=1))
    call = options(name, 3)

    def halves(q, k, v):
        first, memory = linear.attention(
            *(x[:, :, :3] for x in (q, k, v)), name, keep=True, impl="torch", **call
        )
        second, last = linear.attention(
            *(x[:, :, 3:] for x in (q, k, v)),
            name,
            memory=memory,
            keep=True,
            impl="torch",
            causal=causal,
            **call,
        )
        return (
            first,
            second,
            last.sums * (1 if last.top is None else last.top.exp()[..., None, None].detach()),
        )

    if linear.MAPS[name].weighs:  # the memory's scale is a constant to autograd: outputs only
        torch.autograd.gradcheck(lambda *x: halves(*x)[:2], (q, k, v))
    else:
        torch.autograd.gradcheck(halves, (q, k, v))


@pytest.mark.parametrize("name", MAPS)
def test_memory_goes_on(name):
    """Attention in parts, and sums folded in parts, are those of the whole."""
    q, k, v = (x.detach() for x in inputs(100))
    call = options(name) | {"impl": "torch"}
    whole, memory = linear.attention(q, k, v, name, keep=True, **call)
    parts, so_far = [], None
    for low, high in ((0, 40), (40, 41), (41, 100)):
        part = (x[:, :, low:high] for x in (q, k, v))
        out, so_far = linear.attention(*part, name, memory=so_far, keep=True, **call)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    folded = linear.fold(
        k[:, :, 70:],
        v[:, :, 70:],
        name,
        memory=linear.fold(k[:, :, :70], v[:, :, :70], name, **call),
        **call,
    )
    for a, b, c in zip(memory, so_far, folded, strict=True):
        if a is not None:
            torch.testing.assert_close(b, a)
            torch.testing.assert_close(c, a)


@pytest.mark.parametrize("causal", [True, False])
def test_memory_that_is_kept(causal, monkeypatch):
    """What a call computes in memory that the next one takes again is neither returned nor the
    caller's: outputs stay after another call, the sums that were given do not change, and inputs
    may lie in any order."""
    for module in (torch_causal, torch_bidirectional):
        monkeypatch.setattr(module, "BUDGET", {"cpu": 4096})
    q, k, v = (
        x.detach().transpose(1, 2).contiguous().transpose(1, 2)
        for x in inputs(200, heads=4, kv_heads=2)
    )
    before = linear.fold(k, v, "elu", impl="torch")
    given = before.sums.clone(), before.norms.clone()
    call = dict(causal=causal, mask=padding(3, 200), memory=before, keep=True, impl="torch")
    out, after = linear.attention(q, k, v, "elu", **call)
    copies = out.clone(), after.sums.clone(), after.norms.clone()
    linear.attention(-q, k + 1, v * 3, "elu", **call)
    for held, copy in zip(
        (before.sums, before.norms, out, after.sums, after.norms), (*given, *copies), strict=True
    ):
        assert torch.equal(held, copy)
    expected, _ = linear.attention(
        *(x.contiguous() for x in (q, k, v)),
        "elu",
        **call,
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_no_pair_of_tokens_is_held():
    """Memory of a forward and backward pass grows with the tokens, not with their square or with
    the features.
    """
    sizes = []
    for tokens in (2048, 8192):
        held = []
        leaves = [torch.randn(1, 2, tokens, 16, requires_grad=True) for _ in range(3)]

        def keep(x, held=held):
            held.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out, _ = linear.attention(
                *leaves, "favor", directions=torch.randn(256, 16), scale=0.25, impl="torch"
            )
        out.sum().backward()
        sizes.append(sum(held))
    inputs_and_output = 4 * leaves[0].nbytes
    assert sizes[1] < 1.5 * inputs_and_output
    assert sizes[1] < 4.2 * sizes[0]


def test_half_precision_stays_in_range():
    """Sums over many tokens exceed fp16; outputs do not."""
    q, k, v = (torch.full((1, 1, 4096, 8), x, dtype=torch.float16) for x in (2.0, 3.0, 5.0))
    out, memory = linear.attention(q, k, v, "elu", keep=True, impl="torch")
    assert memory.sums.max() > 65504
    torch.testing.assert_close(out, v)


def test_a_query_that_sees_nothing_gives_zero():
    q, k, v = (x.detach() for x in inputs())
    mask = torch.zeros(3, 37, dtype=torch.bool)
    for name in MAPS:
        out, _ = linear.attention(
            q,
            k,
            v,
            name,
            mask=mask,
            impl="torch",
            **options(name),
        )
        assert not out.any()
    out, _ = linear.attention(-q.abs(), k, v, "relu", impl="torch")  # features that are all 0
    assert not out.any()


def test_feature_maps_and_their_derivatives():
    x, w = torch.randn(4, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    for name, one in features.MAPS.items():

        def value(x, one=one):
            phi, mu = one.forward(x.clone(), w)
            return phi if mu is None else phi * mu.exp()[:, None]

        phi, mu = one.forward(x.clone(), w)
        assert (phi >= 0).all() or one.signed
        assert one.weighs == (mu is not None)
        loss = torch.randn_like(phi)
        slope = torch.zeros_like(x)
        for place in range(7):  # by finite differences
            step = torch.zeros(7, dtype=torch.float64)
            step[place] = 1e-6
            slope[:, place] = ((value(x + step) - value(x - step)) * loss).sum(-1) / 2e-6
        grad = loss if mu is None else loss * mu.exp()[:, None]
        torch.testing.assert_close(
            one.backward(x, w, phi, grad), slope, atol=1e-7, rtol=1e-6, msg=name
        )
    assert linear.width("favor", 7, 5) == 5
    assert linear.width("elu", 7) == 7


# Triton, in the interpreter where there is no GPU: a few cases that have everything in them ---

TRITON = [
    ("elu", dict(causal=True), False),
    ("elu", dict(causal=False), True),
    ("relu2", dict(causal=True), True),
    ("identity", dict(causal=True), False),
    ("favor", dict(causal=True), True),
    ("favor", dict(causal=False), True),
    ("favor_relu", dict(causal=True), False),
    ("softmax", dict(causal=True), False),
]


@pytest.mark.parametrize(("name", "call", "masked"), TRITON)
def test_triton_equals_the_definition(name, call, masked):
    leaves = inputs(21, 2, 1, dim=20, batch=2, dtype=torch.float32, device=DEVICE)
    compare(leaves, name, 1e-5, "triton", mask=padding(2, 21, DEVICE) if masked else None, **call)


def test_triton_decay_and_more_keys_than_queries():
    leaves = inputs(37, 2, 1, batch=1, dtype=torch.float32, queries=20, device=DEVICE)
    compare(leaves, "elu", 1e-5, "triton", decay=torch.tensor([0.8], device=DEVICE))


@pytest.mark.parametrize(("dtype", "budget"), [(torch.bfloat16, 1e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("name", ["elu", "favor"])
def test_triton_in_half_precision(name, dtype, budget):
    compare(
        inputs(
            21,
            1,
            1,
            dim=16,
            batch=1,
            dtype=dtype,
            device=DEVICE,
        ),
        name,
        budget,
        "triton",
    )


@pytest.mark.parametrize("name", ["elu", "favor"])
def test_triton_memory_and_decoding(name):
    """The decode kernel after a memory, and the chunked one, with padding and a group of heads."""
    q, k, v = inputs(40, 2, 1, dtype=torch.float32, batch=2, device=DEVICE)
    call = options(name, device=DEVICE) | {"impl": "triton"}
    mask = padding(2, 40, DEVICE)
    expected = reference.attention(q, k, v, name, mask=mask, **options(name, device=DEVICE))
    old, new = mask[:, :30], mask[:, 30:]
    memory = linear.fold(
        k[:, :, :30],
        v[:, :, :30],
        name,
        mask=old,
        **call,
    )
    chunked, last = linear.attention(
        q[:, :, 30:], k[:, :, 30:], v[:, :, 30:], name, mask=new, memory=memory, keep=True, **call
    )
    assert relative(chunked, expected[:, :, 30:]) < 1e-5
    with torch.no_grad():
        decoded, none = linear.attention(
            q[:, :, 37:], k[:, :, 30:], v[:, :, 30:], name, mask=new, memory=memory, **call
        )
    assert none is None
    assert relative(decoded, expected[:, :, 37:]) < 1e-5
    (got,), (true,) = (
        torch.autograd.grad(x.sum(), k, retain_graph=True) for x in (chunked, expected[:, :, 30:])
    )
    assert relative(got, true) < 1e-5  # through the memory
    whole = linear.fold(k, v, name, mask=mask, **call)
    for a, b in zip(last, whole, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_triton_refuses():
    q, k, v = inputs(4)
    with pytest.raises(ValueError, match=r"dtype: got torch\.float64"):
        linear.attention(q, k, v, "elu", impl="triton")
    wide = [torch.zeros(1, 1, 4, 300)] * 3
    with pytest.raises(ValueError, match="head size: got 300"):
        linear.attention(*wide, "elu", impl="triton")


def test_every_architecture_has_tiles():
    for kernel, arch, directed in itertools.product(
        tiles.TILES, ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"), (0, 1)
    ):
        for width in (16, 64, 128, 256):
            assert tiles.tile(kernel, arch, width, bool(directed)).c == 64
