"""The base class: arguments are checked once, errors print expected and actual; states and rotary
rules.
"""

import math

import pytest
import torch

import effattn
from effattn.errors import Unsupported
from effattn.interface import Backend, Cost, FullState, Shape, Traits
from effattn.patterns.dense import Dense


def qkv(batch=2, heads=4, kv_heads=2, queries=5, keys=7, dim=8, value_dim=8, **options):
    shapes = (
        (batch, heads, queries, dim),
        (batch, kv_heads, keys, dim),
        (batch, kv_heads, keys, value_dim),
    )
    return [torch.randn(shape, **options) for shape in shapes]


Q, K, V = qkv()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, r"q: expected \(batch, heads, tokens, head_dim\).*got \(4, 5, 8\)"),
        ({"q": None}, "q: expected .* got NoneType"),
        ({"q": Q[:, :3]}, "expected a multiple of k's 2 heads, got 3"),
        ({"q": Q[..., :4]}, r"k: expected \(2, kv_heads, keys, 4\) to fit q, got \(2, 2, 7, 8\)"),
        ({"k": K[:1]}, r"k: expected \(2, kv_heads, keys, 8\).*got \(1, 2, 7, 8\)"),
        ({"v": V[:, :, :6]}, r"v: expected \(2, 2, 7, value_dim\) to fit k, got \(2, 2, 6, 8\)"),
        ({"k": K[:, :, :4], "v": V[:, :, :4]}, "at least q's 5 tokens, got 4"),
        ({"v": V.double()}, "one float dtype, got torch.float32, torch.float32, torch.float64"),
        ({"q": Q.long(), "k": K.long(), "v": V.long()}, "one float dtype"),
        ({"k": K.to("meta")}, "one device, got cpu, meta, cpu"),
        (
            {"padding_mask": torch.ones(2, 5, dtype=torch.bool)},
            r"padding_mask: expected \(2, 7\), got \(2, 5\)",
        ),
        ({"padding_mask": torch.ones(2, 7)}, "expected torch.bool on cpu, got torch.float32"),
        ({"scale": math.inf}, "scale: expected a finite number, got inf"),
        ({"scale": math.nan}, "scale: expected a finite number, got nan"),
        ({"scale": 0.0}, "scale: expected a number above 0, got 0.0"),
        ({"scale": -0.5}, "scale: expected a number above 0, got -0.5"),
        ({"scale": "0.5"}, "scale: expected a number, got str"),
        ({"scale": torch.ones(4)}, r"scale: expected one number, got a tensor \(4,\)"),
        (
            {"q": Q.to("meta"), "k": K.to("meta"), "v": V.to("meta")},
            "meta device, which hold no numbers",
        ),
        (
            {"padding_mask": [[True] * 7] * 2},
            r"padding_mask: expected a tensor \(2, 7\) of torch.bool, got list",
        ),
        ({"softcap": 0}, "softcap: expected a number above 0, got 0.0"),
        ({"softcap": -50.0}, "softcap: expected a number above 0, got -50.0"),
        ({"softcap": math.nan}, "softcap: expected a finite number, got nan"),
        ({"softcap": True}, "softcap: expected a number, got bool"),
        (
            {"sink_logits": torch.zeros(2)},
            r"sink_logits: expected .*\(4,\) on cpu, got \(2,\) torch.float32 on cpu",
        ),
        (
            {"sink_logits": torch.zeros(4, dtype=torch.long)},
            "sink_logits: expected .* got .4,. torch.int64",
        ),
        ({"sink_logits": torch.zeros(4, device="meta")}, "sink_logits: expected .* on meta"),
        ({"sink_logits": 0.5}, "sink_logits: expected .* got float"),
        (
            {"softcp": 3.0},
            "argument: got 'softcp' .did you mean 'softcap'.., valid are 'softcap', 'sink_logits'",
        ),
        ({"rotary": 3}, "rotary: expected a callable rule, got int"),
        ({"state": {}}, "state: expected one from dense's new_state.., got dict"),
        (
            {"rotary": lambda q, k, i, j: (q, k[:1])},
            r"rotary: returned k \(1, 2, 7, 8\), expected \(2, 2, 7, 8\)",
        ),
    ],
)
def test_errors_print_expected_and_actual(change, message):
    with pytest.raises(ValueError, match=message):
        Dense()(**{"q": Q, "k": K, "v": V} | change)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Q, r"expected three tensors, q, k and v, got \(2, 4, 5, 8\)"),
        ((Q, K), "expected three tensors, q, k and v, got 2 of Tensor"),
        ((Q, K, None), "expected three tensors, q, k and v, got 3 of NoneType, Tensor"),
        ((Q, K.to("meta"), V), "expected tensors on cpu, got cpu, meta, cpu"),
        ((Q, K[:, :1], V), r"expected k \(2, 2, 7, 8\) torch.float32, got \(2, 1, 7, 8\)"),
        ((Q, K.double(), V), "expected k .* got .* torch.float64"),
    ],
)
def test_global_projections_have_to_fit(given, message):
    attn = effattn.backend("longformer", window=3, global_tokens=2)
    state = attn.new_state()
    with pytest.raises(ValueError, match="global_qkv: " + message):
        attn(Q, K, V, global_qkv=given, state=state)
    assert state.seq_len == 0


def test_traits_are_enforced():
    class OneWay(Dense):
        traits = Traits(exact=True, causal=False, bidirectional=True, learned=False, state="none")

    class Other(Dense):
        traits = Traits(exact=True, causal=True, bidirectional=False, learned=False, state="none")

    with pytest.raises(Unsupported, match="causal=True is not possible"):
        OneWay()(Q, K, V)
    with pytest.raises(Unsupported, match="causal=False is not possible"):
        Other()(Q, K, V, causal=False)


def test_implementations(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Dense().chosen_impl == Dense(impl="torch").chosen_impl == "torch"
    assert Dense(impl="reference").chosen_impl == "reference"
    with pytest.raises(
        ValueError, match="impl: 'triton' needs a GPU, this machine has none; valid here are 'auto'"
    ):
        Dense(impl="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        Dense(impl="triton")(Q, K, V)
    with pytest.raises(ValueError, match="did you mean 'torch'"):
        Dense(impl="trch")


def test_mask_with_a_state_covers_the_past():
    attn, state = Dense(), FullState()
    attn(Q, K, V, state=state)
    one = torch.ones(2, 1, dtype=torch.bool)
    with pytest.raises(
        ValueError,
        match=r"padding_mask: expected \(2, 8\) \(7 in the state \+ 1 new\), got \(2, 1\)",
    ):
        attn(
            Q[:, :, :1],
            K[:, :, :1],
            V[:, :, :1],
            state=state,
            padding_mask=one,
        )
    assert state.seq_len == 7  # a refused call leaves the state as it was
    attn(
        Q[:, :, :1],
        K[:, :, :1],
        V[:, :, :1],
        state=state,
        padding_mask=one.expand(2, 8),
    )
    assert state.seq_len == 8


def test_full_state():
    state = FullState()
    assert (state.seq_len, state.nbytes) == (0, 0)
    k, v = torch.arange(12.0).view(3, 1, 2, 2), torch.arange(18.0).view(3, 1, 2, 3)
    state.append(k, v)
    assert state.nbytes == (12 + 18) * 4
    state.reorder(torch.tensor([2, 0, 0]))
    assert torch.equal(state.k, k[[2, 0, 0]])
    with pytest.raises(ValueError, match="expected 3 rows, got 2"):
        state.reorder(torch.tensor([0, 1]))
    state.select(torch.tensor([1]))
    state.repeat(2)
    assert torch.equal(state.v, v[[0, 0]])
    with pytest.raises(
        ValueError,
        match=r"the state holds \(2, 1, 2, 2\) torch.float32, got new tokens \(3, 1, 2, 2\)",
    ):
        state.append(k, v)
    for bad in (-1, 3):
        with pytest.raises(ValueError, match="valid is 0 to 2"):
            state.crop(bad)
    state.crop(1)
    assert torch.equal(state.k, k[[0, 0], :, :1])
    state.crop(0)
    assert state.seq_len == 0
    state.append(k, v)
    state.reset()
    assert state.seq_len == 0


def rotary(q, k, q_positions, k_positions):
    """RoPE with one frequency per pair, enough to see where positions come from."""

    def turn(x, positions):
        angle = positions[..., None].to(x) * torch.logspace(0, -2, x.shape[-1] // 2, dtype=x.dtype)
        angle = angle[:, None] if angle.ndim == 3 else angle
        a, b = x.chunk(2, dim=-1)
        return torch.cat(
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1
        )

    return turn(q, q_positions), turn(k, k_positions)


def test_rotary_prefill_equals_decode_and_ignores_left_padding():
    attn, state = Dense(), FullState()
    q, k, v = qkv(queries=6, keys=6, dtype=torch.float64)
    whole = attn(q, k, v, rotary=rotary)
    assert not torch.allclose(whole, attn(q, k, v))
    parts = [(0, 3), (3, 4), (4, 6)]
    steps = [
        attn(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], state=state, rotary=rotary) for a, b in parts
    ]
    torch.testing.assert_close(torch.cat(steps, dim=2), whole)

    seen = []
    padded = [torch.cat([torch.randn_like(x[:, :, :2]), x], dim=2) for x in (q, k, v)]
    mask = torch.tensor([[False] * 2 + [True] * 6] * 2)
    out = attn(
        *padded,
        padding_mask=mask,
        rotary=lambda *a: seen.append(a[2:]) or rotary(*a),
    )
    torch.testing.assert_close(out[:, :, 2:], whole)
    assert seen[0][1].tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]] * 2


def test_cost():
    causal = Dense().cost(
        Shape(
            2,
            4,
            2,
            queries=3,
            keys=5,
            head_dim=8,
            value_dim=16,
            itemsize=2,
        )
    )
    pairs = 3 + 4 + 5
    assert causal.flops == 2 * 2 * 4 * pairs * (8 + 16)
    assert causal.state_bytes == 2 * 2 * 5 * (8 + 16) * 2
    assert causal.read_bytes == causal.state_bytes + 2 * 4 * 3 * 8 * 2
    assert causal.write_bytes == 2 * 4 * 3 * 16 * 2
    assert causal.intensity == causal.flops / (causal.read_bytes + causal.write_bytes)
    full = Dense().cost(Shape(2, 4, 2, 3, 5, 8, 16, 2, causal=False))
    assert full.flops == 2 * 2 * 4 * 15 * 24
    assert causal + full == Cost(
        causal.flops + full.flops,
        *(2 * x for x in (causal.read_bytes, causal.write_bytes, causal.state_bytes)),
    )
    assert Shape(1, 1, 1, 1, 1, head_dim=64).value_dim == 64
    assert Cost(flops=1).intensity == math.inf


def test_a_backend_without_a_method_says_so():
    with pytest.raises(NotImplementedError):
        Backend.attend(None, Q, K, V, None)
