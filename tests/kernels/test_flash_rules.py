"""Score rules of flash attention, far pairs (ReRoPE, Leaky ReRoPE) and biases, against their
definitions in fp64.
"""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from test_flash_torch import largest_tensors

from effattn.kernels.decode.torch_impl import attention as at_once
from effattn.kernels.decode.turn import rotate
from effattn.kernels.flash import (
    Bias,
    Blocks,
    Far,
    Layout,
    Pattern,
    Window,
    attention,
    torch_blocks,
    torch_fused,
)
from effattn.kernels.flash.pattern import layout_of
from effattn.kernels.flash.reference import attention as reference
from effattn.kernels.flash.reference import rotary_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOPES = [[0.5], [0.1], [0.02], [0.3]]
BIASES = {
    "alibi": SLOPES,
    "kerple_log": [[0.7, 0.4]],
    "kerple_power": [[0.2, 0.6], [0.1, 1.5], [0.3, 2.0], [0.1, 0.9]],
    "table": [[0.3, -0.2, 0.5, 0.1, -0.7, 0.2, -1.0]],
}


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(queries=70, keys=70, batch=2, heads=4, kv_heads=2, dim=8, far=True, dtype=torch.float64):
    """q, k, v and then q and k of far pairs."""
    shapes = [(heads, queries), (kv_heads, keys), (kv_heads, keys)] + far * [
        (heads, queries),
        (kv_heads, keys),
    ]
    made = [
        draw(batch, *shape, dim, seed=n, dtype=dtype).to(DEVICE) for n, shape in enumerate(shapes)
    ]
    return [x.requires_grad_() for x in made]


def padded(*pads, keys=70):
    """So much padding on the left of each row, and a hole in the last one."""
    real = torch.arange(keys) >= torch.tensor(pads)[:, None]
    real[-1, keys // 2 : keys // 2 + 3] = False
    return layout_of(real.to(DEVICE))


def both(tensors, pattern, layout, window=None, bias=None, softcap=None, impl="torch", causal=True):
    """(out, lse, gradients) of the implementation, and of the definition in fp64."""
    layout = layout or Layout()
    queries, keys = tensors[0].shape[2], tensors[1].shape[2]
    i, at = layout.query_positions(queries, keys, DEVICE), layout.key_positions(keys, DEVICE)
    heads = torch.arange(tensors[0].shape[1], device=DEVICE)[None, :, None, None]
    seen = pattern.sees(i[:, None, :, None], at[:, None, None], heads, tensors[0].shape[1], causal)
    found = []
    for true in (False, True):
        leaves = [
            x.detach().to(torch.float64 if true else x.dtype).requires_grad_() for x in tensors
        ]
        q, k, v, *others = leaves
        params = (
            None
            if bias is None
            else bias.params.to(DEVICE, leaves[0].dtype).requires_grad_(impl == "torch")
        )
        rules = dict(
            far=Far(*others, window) if others else None,
            bias=bias and Bias(bias.kind, params),
            softcap=softcap,
        )
        if true:
            out, lse = reference(
                q, k, v, seen, scale=0.4, distance=i[:, :, None] - at[:, None], **rules
            )
        else:
            out, lse = attention(
                q, k, v, pattern, layout, scale=0.4, causal=causal, impl=impl, lse=True, **rules
            )
        finite = torch.where(lse.isfinite(), lse, 0.0)
        loss = (out * draw(*out.shape).to(out)).sum() + (finite * draw(*lse.shape).to(lse)).sum()
        wanted = leaves + ([params] if params is not None and params.requires_grad else [])
        grads = torch.autograd.grad(loss, wanted, materialize_grads=True)
        found.append([out.detach(), torch.where(lse.isfinite(), lse, -9.0).detach(), *grads])
    return found


def agree(*args, **options):
    got, true = both(*args, **options)
    for one, other in zip(got, true, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype))  # fails on NaN


@pytest.fixture
def small(monkeypatch):
    """Many tiles at lengths a reference can afford."""
    for name, value in (("QUERIES", 16), ("KEYS", 11), ("WORK", 64)):
        monkeypatch.setattr(torch_blocks, name, value)
    for name, value in (
        ("FORWARD", 16),
        ("BACKWARD", 16),
        ("ROOM", 640),
        ("SIDE", 16),
        ("SHORT", 0),
    ):
        monkeypatch.setattr(torch_fused, name, value)


# ReRoPE by its formulas
# -------------------------------------------------------------------------------------------------

INV_FREQ = 100.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)


def turned(x, position):
    angle = position.double()[:, None] * INV_FREQ
    return rotate(x, angle.cos(), angle.sin())


def rerope(q, k, v, window, slow=math.inf, start=0, border=None):
    """Leaky ReRoPE as a caller runs it, with positions from `start` on; far from a distance of
    `border` on.
    """
    i = start + torch.arange(q.shape[2])
    far = Far(
        turned(q, (i - window) / slow + window),
        turned(k, i / slow),
        border or window,
    )
    return attention(turned(q, i), turned(k, i), v, far=far, impl="torch")


@pytest.mark.parametrize("slow", [math.inf, 8.0, 1.0])
@pytest.mark.parametrize("window", [1, 13, 64])
def test_rerope_is_its_definition_pair_by_pair(window, slow, small):
    q, k, v = (draw(1, 2, 70, 8, seed=n) for n in range(3))
    i = torch.arange(70)
    scores = rotary_scores(q, k, i[:, None] - i, INV_FREQ, window, slow) * 8**-0.5
    expected = torch.softmax(scores.masked_fill(i > i[:, None], -torch.inf), dim=-1) @ v
    torch.testing.assert_close(rerope(q, k, v, window, slow), expected, rtol=0, atol=1e-13)


def test_what_rerope_is_at_its_limits(small):
    """Both scores agree at the border; positions shift; no pair far, or slow = 1: RoPE; slow = inf:
    the limit.
    """
    q, k, v = (draw(1, 2, 70, 8, seed=n) for n in range(3))
    i = torch.arange(70)
    near = rerope(q, k, v, 13)
    torch.testing.assert_close(rerope(q, k, v, 13, border=14), near)
    torch.testing.assert_close(
        rerope(q, k, v, 13, slow=4.0, border=14), rerope(q, k, v, 13, slow=4.0)
    )
    torch.testing.assert_close(
        rerope(q, k, v, 13, slow=4.0, start=1000), rerope(q, k, v, 13, slow=4.0)
    )
    torch.testing.assert_close(
        rerope(q, k, v, 13, slow=1e7),
        near,
        rtol=0,
        atol=1e-5,
    )
    rope = attention(turned(q, i), turned(k, i), v, impl="torch")
    torch.testing.assert_close(rerope(q, k, v, 13, slow=1.0), rope)
    assert torch.equal(rerope(q, k, v, 70), rope)
    assert (near - rope).abs().max() > 0.01


# Plain torch
# -------------------------------------------------------------------------------------------------

PATTERNS = [
    (Pattern(), 13),
    (Window(back=40), 13),
    (Window(back=9), 13),
    (Window(first=3, back=30), 13),
    (Window(first=4, back=9), 21),
    (Blocks(size=20, look_back=1), 13),
    (Blocks(first=2, size=12, shifted=True), 5),
]


@pytest.mark.parametrize(("pattern", "window"), PATTERNS)
@pytest.mark.parametrize("case", ["whole", "chunk", "padded", "slots", "capped"])
def test_far_pairs_forward_and_backward(pattern, window, case, small):
    layout = {"padded": padded(0, 17), "slots": Layout(slots=3, tail=5)}.get(case)
    agree(
        inputs(queries=70 if case in ("whole", "capped") else 40),
        pattern,
        layout,
        window,
        softcap=2.0 if case == "capped" else None,
    )


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize(
    ("pattern", "causal"),
    [
        (Pattern(), True),
        (Window(first=3, back=30), True),
        (Pattern(), False),
    ],
)
def test_biases_forward_and_backward(kind, pattern, causal, small):
    bias = Bias(kind, torch.tensor(BIASES[kind]))
    agree(inputs(far=False), pattern, None, bias=bias, causal=causal)
    agree(
        inputs(queries=40, far=False), pattern, padded(5, 20), bias=bias, causal=causal, softcap=2.0
    )


def test_gradcheck(small):
    q, k, v, q_far, k_far = inputs(
        queries=4,
        keys=7,
        batch=1,
        heads=2,
        kv_heads=1,
        dim=2,
    )
    params = torch.tensor([[0.5, 0.3]], dtype=torch.float64, requires_grad=True)

    def far(q, k, v, q_far, k_far):
        return attention(q, k, v, far=Far(q_far, k_far, 3), impl="torch", lse=True)

    def bias(q, k, v, params):
        return attention(q, k, v, bias=Bias("kerple_power", params), impl="torch", lse=True)

    assert torch.autograd.gradcheck(far, (q, k, v, q_far, k_far))
    assert torch.autograd.gradcheck(bias, (q, k, v, params))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_it_can_be(dtype):
    tensors = inputs(queries=200, keys=200, batch=1, dim=16, dtype=dtype)
    got, true = both(tensors, Pattern(), None, 50)
    for one, other in zip(got, true, strict=True):
        assert (one.double() - other).norm() < 0.005 * other.norm()


def test_the_way_that_traces():
    """Under torch.compile the decode kernel takes the calls: a loop over tiles does not trace."""
    q, k, v, q_far, k_far = inputs()
    options = dict(
        causal=True, scale=0.4, softcap=None, q_first=None, need_lse=True, far=Far(q_far, k_far, 13)
    )
    got = at_once(
        q,
        k,
        v,
        Window(back=40, first=2),
        padded(0, 9),
        counts=None,
        **options,
    )
    options = dict(far=options["far"], scale=0.4, lse=True, impl="torch")
    torch.testing.assert_close(
        got, attention(q, k, v, Window(back=40, first=2), padded(0, 9), **options)
    )


@pytest.mark.parametrize("rule", ["far", "bias"])
def test_memory_is_linear(rule):
    def largest(tokens):
        x = inputs(
            tokens, tokens, batch=1, heads=1, kv_heads=1, far=rule == "far", dtype=torch.float32
        )
        bias = Bias("alibi", torch.ones(1, 1, requires_grad=True)) if rule == "bias" else None
        far = Far(*x[3:], 100) if rule == "far" else None
        return largest_tensors(
            lambda: attention(*x[:3], far=far, bias=bias, impl="torch").sum().backward()
        )

    assert largest(2048) <= 2.1 * largest(1024)


# Triton
# -------------------------------------------------------------------------------------------------


def close(*args, **options):
    got, true = both(*args, impl="triton", **options)
    assert len(got) == len(true)
    for one, other in zip(got, true, strict=True):
        assert (one.double() - other).norm() <= 2e-6 * other.norm()  # fails on NaN


def test_far_pairs_in_triton():
    close(
        inputs(
            50,
            50,
            batch=1,
            heads=2,
            kv_heads=1,
            dtype=torch.float32,
        ),
        Pattern(),
        None,
        18,
    )


def test_far_pairs_in_triton_with_everything():
    layout = Layout(slots=3, tail=7, start=torch.tensor([0, 4], device=DEVICE))
    tensors = inputs(20, 40, heads=1, kv_heads=1, dtype=torch.float32)
    close(tensors, Window(first=2, back=25), layout, 17, softcap=2.0)


@pytest.mark.parametrize("kind", BIASES)
def test_biases_in_triton(kind):
    capped = {"softcap": 2.0} if kind == "alibi" else {}
    bias = Bias(kind, torch.tensor(BIASES[kind][:2]))
    tensors = inputs(
        20,
        24,
        batch=1,
        heads=2,
        kv_heads=1,
        far=False,
        dtype=torch.float32,
    )
    close(tensors, Window(first=2, back=13), None, bias=bias, **capped)


# Bad input
# -------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    q, k, v, q_far, k_far = inputs(20, 20, dtype=torch.float32)
    far, slopes = Far(q_far, k_far, 5), Bias("alibi", torch.tensor(SLOPES))
    for wrong, said in (
        (dict(far=far, causal=False), "far: got causal=False"),
        (dict(far=far, bias=slopes), "far: got a bias too"),
        (dict(far=far, q_first=q, pattern=Window(first=2, back=9)), "far: got q_first too"),
        (dict(far=Far(q_far[:, :1], k_far, 5)), "far.q: got"),
        (dict(far=Far(q_far, k_far.double(), 5)), "far.k: got"),
        (dict(bias=Bias("alibi", torch.ones(3, 1))), "bias.params: got 3 heads, valid are 1 and 4"),
    ):
        with pytest.raises(ValueError, match=said):
            attention(q, k, v, impl="torch", **wrong)
    with pytest.raises(ValueError, match=r"far\.window: got 0"):
        Far(q_far, k_far, 0)
    with pytest.raises(ValueError, match="did you mean 'alibi'"):
        Bias("alibbi", torch.ones(1, 1))
    with pytest.raises(
        ValueError, match=r"got shape \(2, 1\), valid for 'kerple_log' is \(heads or 1, 2\)"
    ):
        Bias("kerple_log", torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"bias\.params: the Triton kernels have no gradient"):
        attention(
            q,
            k,
            v,
            bias=Bias("alibi", torch.ones(4, 1, requires_grad=True)),
            impl="triton",
        )
