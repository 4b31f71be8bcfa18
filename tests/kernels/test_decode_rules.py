"""Keys that are rotated when they are read: decoding equals prefill, in plain torch and in Triton;
and biases.
"""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from effattn.kernels import decode, flash
from effattn.kernels.decode import Turn
from effattn.kernels.decode.turn import rotate
from effattn.kernels.flash import Bias, Far, Layout, Pattern, Window
from effattn.kernels.flash.pattern import layout_of
from effattn.kernels.flash.reference import attention as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 60


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
    ).to(DEVICE, dtype)


def raw(queries=1, keys=TOKENS, batch=2, heads=4, kv_heads=2, dim=16, dtype=torch.float64):
    shapes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [draw(batch, *shape, dim, seed=n, dtype=dtype) for n, shape in enumerate(shapes)]


def turning(dim=16, dtype=torch.float64):
    return 100.0 ** (-torch.arange(0, dim, 2, device=DEVICE).to(dtype) / dim)


def turned(x, position, turn):
    """x (B, H, T, D) at positions (1 or B, T)."""
    angle = position.double()[:, None, :, None] * turn.inv_freq.double()
    cos, sin = ((y * turn.scaling).to(x.dtype) for y in (angle.cos(), angle.sin()))
    return rotate(x, cos, sin, turn.interleaved)


def both(
    q,
    k,
    v,
    layout=None,
    pattern=None,
    impl="torch",
    window=None,
    slow=math.inf,
    first=False,
    **settings,
):
    """(out, lse) of the decode kernel over raw keys, and of the definition in fp64, over keys
    rotated in advance. With `first`, the first keys of the pattern see the query elsewhere."""
    layout, pattern, queries, keys = (
        layout or Layout(),
        pattern or Pattern(),
        q.shape[2],
        k.shape[2],
    )
    i, j = layout.query_positions(queries, keys, DEVICE), layout.key_positions(keys, DEVICE)
    turn = Turn(settings.pop("inv_freq", turning()).to(q.dtype), **settings)
    near, q_far, q_first = turned(q, i, turn), None, turned(q, i * 0 + 7, turn) if first else None
    if window is not None:
        q_far = turned(q, (i - window) / slow + window, turn)
    rules = dict(window=window, slow=slow, q_far=q_far)
    seen = pattern.sees(
        i[:, None, :, None], j[:, None, None], torch.zeros(1, device=DEVICE), q.shape[1], True
    )
    got = decode.attention(
        near,
        k,
        v,
        pattern,
        layout,
        turn=Turn(turn.inv_freq, turn.interleaved, turn.scaling, **rules),
        q_first=q_first,
        impl=impl,
        lse=True,
        scale=0.4,
    )
    far = None if window is None else Far(q_far, turned(k, j / slow, turn), window)
    expected = reference(
        near,
        turned(k, j, turn),
        v,
        seen,
        scale=0.4,
        far=far,
        distance=i[:, :, None] - j[:, None],
        q_first=q_first,
        first=(j >= 0) & (j < pattern.first),
    )
    return got, expected


def agree(*args, tolerance=1e-12, **options):
    for one, other in zip(*both(*args, **options), strict=True):
        finite = other.isfinite()
        assert torch.equal(finite, one.isfinite())
        assert (one.double() - other)[finite].norm() <= tolerance * other[finite].norm()


def padded(*pads):
    real = torch.arange(TOKENS) >= torch.tensor(pads)[:, None]
    real[-1, 30:33] = False
    return layout_of(real.to(DEVICE))


def ring(slots=0):
    """The newest 60 of 100 tokens, in the order a ring has them, behind `slots` first ones."""
    numbers = torch.arange(100 - TOKENS + slots, 100, device=DEVICE).roll(23)
    return Layout(slots=slots, ring=numbers, total=100)


LAYOUTS = {
    "plain": (None, None),
    "padded": (padded(0, 11), None),
    "slots": (Layout(slots=3, tail=40), Window(first=3, back=60)),
    "window": (None, Window(first=2, back=40)),
    "ring": (ring(), Window(back=55)),
    "ring and slots": (ring(3), Window(first=3, back=50)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"window": 17},
        {"window": 17, "slow": 4.0},
        {"window": 200},
    ],
)
def test_raw_keys(layout, queries, rule):
    for settings in ({}, PARTIAL):
        agree(*raw(queries), *LAYOUTS[layout], **rule, **settings)
    if not rule and LAYOUTS[layout][1]:
        agree(*raw(queries), *LAYOUTS[layout], first=True)


@pytest.mark.parametrize("slow", [math.inf, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decoding_equals_prefill(slow, dtype):
    """Token by token, and five at a time, against the flash kernel with keys rotated in advance."""
    window, (q, k, v), at = 17, raw(TOKENS, dtype=dtype), torch.arange(TOKENS, device=DEVICE)[None]
    turn = Turn(turning())
    near, far = turned(q, at, turn), turned(q, (at - window) / slow + window, turn)
    whole = flash.attention(
        near, turned(k, at, turn), v, far=Far(far, turned(k, at / slow, turn), window), impl="torch"
    )
    for step in (1, 5):
        for t in range(step, TOKENS + 1, step):
            now = slice(t - step, t)
            rule = Turn(turning(), window=window, slow=slow, q_far=far[:, :, now])
            out = decode.attention(
                near[:, :, now], k[:, :, :t], v[:, :, :t], turn=rule, impl="torch"
            )
            budget = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(out, whole[:, :, now], rtol=budget, atol=budget)


def test_gradients_flow():
    q, k, v = (
        x.requires_grad_()
        for x in raw(
            2,
            keys=9,
            batch=1,
            heads=2,
            kv_heads=1,
            dim=4,
        )
    )
    q_far = draw(1, 2, 2, 4, seed=9).requires_grad_()

    def run(q, k, v, q_far):
        return decode.attention(
            q, k, v, turn=Turn(turning(4), window=3, slow=2.0, q_far=q_far), impl="torch"
        )

    assert torch.autograd.gradcheck(run, (q, k, v, q_far))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_biases(impl):
    q, k, v = raw(2, keys=40, dtype=torch.float32, heads=2, kv_heads=1)
    layout, pattern = Layout(start=torch.tensor([0, 5], device=DEVICE)), Window(first=2, back=30)
    i, j = layout.query_positions(2, 40, DEVICE), layout.key_positions(40, DEVICE)
    seen = pattern.sees(
        i[:, None, :, None], j[:, None, None], torch.zeros(1, device=DEVICE), 2, True
    )
    for kind, params in (
        ("alibi", [[0.3], [0.1]]),
        ("kerple_log", [[0.3, 2.0]]),
        ("kerple_power", [[0.3, 0.5]]),
        ("table", [[0.3, -1.0, 0.2, 0.7], [0.1, 0.2, 0.3, 0.4]]),
    ):
        bias = Bias(kind, torch.tensor(params, device=DEVICE))
        options = dict(scale=0.4, softcap=3.0 if kind == "table" else None, bias=bias)
        got = decode.attention(q, k, v, pattern, layout, lse=True, impl=impl, **options)
        true = reference(
            q,
            k,
            v,
            seen,
            distance=i[:, :, None] - j[:, None],
            **options,
        )
        for one, other in zip(got, true, strict=True):
            torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)


PARTIAL = {"inv_freq": turning(10), "interleaved": True, "scaling": 1.3}
TRITON = {
    "rope": ("plain", 1, {}, {}),
    "rerope": ("plain", 1, {"window": 17}, {}),
    "partial, interleaved": ("padded", 3, {"window": 17}, PARTIAL),
    "leaky": ("window", 2, {"window": 17, "slow": 4.0}, {}),
    "leaky, slots": ("slots", 3, {"window": 17, "slow": 4.0}, {}),
    "ring": ("ring and slots", 2, {"window": 17}, {}),
    "first": ("ring and slots", 2, {"first": True}, {}),
}


@pytest.mark.parametrize("case", TRITON)
def test_triton(case, monkeypatch):
    """In splits and tiles of 16, so that there are some of every class."""
    from effattn.kernels.decode import triton_impl

    tile = triton_impl.tile
    monkeypatch.setattr(triton_impl, "tile", lambda *args: {**tile(*args), "BLOCK_N": 16})
    uncached = triton_impl._constants.__wrapped__
    monkeypatch.setattr(triton_impl, "_constants", uncached)  # with the tiles of above
    monkeypatch.setattr(triton_impl, "split", lambda tiles, programs, processors: min(2, tiles))
    layout, queries, rule, settings = TRITON[case]
    rows = 2 if layout == "padded" else 1
    tensors = raw(queries, batch=rows, heads=2, kv_heads=1, dtype=torch.float32)
    agree(*tensors, *LAYOUTS[layout], impl="triton", tolerance=1e-6, **rule, **settings)


def test_angles_of_long_contexts():
    """cos and sin in the kernel are those of the angle in fp32, as far as a million tokens."""
    position, inv_freq = (
        torch.tensor([0, 1, 4095, 131071, 1048575], device=DEVICE),
        turning(32, torch.float32),
    )
    position = torch.cat([position, torch.arange(27, device=DEVICE) * 37717])
    k, q = torch.zeros(1, 1, 32, 32, device=DEVICE), torch.zeros(1, 1, 1, 32, device=DEVICE)
    k[..., :16], q[..., 0] = 1, 30.0  # the scores are 30 cos of the first frequency
    layout, v = Layout(ring=position, total=1048577), torch.eye(32, device=DEVICE)[None, None]
    for frequency in (0, 5):
        q.zero_()[..., frequency] = 30.0
        got, truth = (
            decode.attention(q, k, v, layout=layout, turn=Turn(inv_freq), impl=impl)
            for impl in ("triton", "torch")
        )
        angle = (position.float() * inv_freq[frequency]).double()
        expected = torch.softmax(angle.cos() * 30 * 32**-0.5, dim=0)
        torch.testing.assert_close(
            got[0, 0, 0].double(),
            expected,
            rtol=1e-5,
            atol=1e-7,
        )
        torch.testing.assert_close(
            truth[0, 0, 0].double(),
            expected,
            rtol=1e-5,
            atol=1e-7,
        )


def test_bad_input_is_named():
    q, k, v = raw(dtype=torch.float32)
    far = Turn(turning(), window=4, q_far=q)
    for wrong, said in (
        (dict(turn=far, causal=False), "turn.window: got causal=False"),
        (
            dict(turn=far, q_first=q, pattern=Window(first=2, back=9)),
            "turn.window: got q_first too",
        ),
        (dict(turn=far, bias=Bias("alibi", torch.ones(4, 1))), "turn.window: got a bias too"),
        (dict(turn=Turn(turning(), window=4, q_far=q[:, :1])), "turn.q_far: got"),
        (dict(turn=Turn(turning(32))), "turn.inv_freq: got 16 frequencies, at most 8 are valid"),
    ):
        with pytest.raises(ValueError, match=said):
            decode.attention(q, k, v, impl="torch", **wrong)
    with pytest.raises(ValueError, match="valid are both or neither"):
        Turn(turning(), window=4)
    with pytest.raises(ValueError, match=r"turn\.window: got 0"):
        Turn(turning(), window=0, q_far=q)
    with pytest.raises(ValueError, match=r"turn\.slow: got 0\.5"):
        Turn(turning(), window=4, slow=0.5, q_far=q)
