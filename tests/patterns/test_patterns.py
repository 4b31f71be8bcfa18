"""Each exact pattern: the paper's definition by hand, its cost, its options, its own features; and
what it refuses.
"""

import math

import pytest
import torch
from torch import nn

from effattn.errors import Unsupported
from effattn.interface import Shape
from effattn.patterns import longnet, residues
from effattn.registry import backend

T = 23


def by_hand(name, i, j, h, o, causal):
    """How often the query at i of head h (of 4) sees the key at j."""
    if causal and j > i:
        return 0
    if name == "block":
        return i // o["block"] - o.get("look_back", 0) <= j // o["block"] <= i // o["block"]
    if name == "sliding" or name == "longformer":
        d = o.get("dilation", 1)
        reach = o["window"] - 1 if causal else (o["window"] - 1) // 2
        near = abs(i - j) % d == 0 and abs(i - j) // d <= reach
        if name == "sliding":
            return near or j < o.get("sinks", 0)
        chosen = (
            range(o["global_tokens"]) if isinstance(o["global_tokens"], int) else o["global_tokens"]
        )
        return near or i in chosen or j in chosen
    if name == "strided":
        return i - j < o["stride"] or (i - j) % o["stride"] == 0
    if name == "fixed":
        return i // o["stride"] == j // o["stride"] or j % o["stride"] >= o["stride"] - o.get(
            "summary", 1
        )
    if name == "s2":
        b, shift = o["block"], o["block"] // 2 if h >= 2 else 0
        return (i + shift) // b == (j + shift) // b
    if name == "longnet":
        return sum(
            i // w == j // w and i % w % r == h % r and j % w % r == h % r
            for w, r in zip(o["segments"], o["dilations"], strict=True)
        )
    return 1


PATTERNS = [
    ("dense", {}),
    ("block", {"block": 4}),
    ("block", {"block": 3, "look_back": 2}),
    ("sliding", {"window": 5}),
    ("sliding", {"window": 4, "sinks": 3}),
    ("sliding", {"window": 3, "dilation": 4}),
    ("longformer", {"window": 3, "global_tokens": 2}),
    ("longformer", {"window": 5, "global_tokens": [0, 7, 22]}),
    ("strided", {"stride": 4}),
    ("fixed", {"stride": 4}),
    ("fixed", {"stride": 5, "summary": 2}),
    ("s2", {"block": 6}),
    ("longnet", {"segments": [4, 12], "dilations": [1, 3]}),
]
WAYS = [
    (name, options, causal)
    for name, options in PATTERNS
    for causal in (True, False)
    if causal
    or (
        name not in ("strided", "fixed")
        and not options.get("sinks")
        and options.get("window", 1) % 2
    )
]


@pytest.mark.parametrize(("name", "options", "causal"), WAYS)
def test_definition_and_cost(name, options, causal):
    attn = backend(name, **options)
    i, j, h = torch.arange(T)[:, None], torch.arange(T)[None], torch.arange(4)[:, None, None]
    seen = attn.sees(i, j, h, 4, causal).expand(4, T, T)
    expected = [
        [[int(by_hand(name, a, b, c, options, causal)) for b in range(T)] for a in range(T)]
        for c in range(4)
    ]
    assert seen.int().tolist() == expected
    for queries in (1, 7, T) if causal else (T,):
        shape = Shape(
            2,
            4,
            2,
            queries,
            T,
            head_dim=8,
            value_dim=16,
            itemsize=4,
            causal=causal,
        )
        cost, rows = attn.cost(shape), seen[:, T - queries :]
        assert cost.flops == 2 * 2 * int(rows.sum()) * (8 + 16)
        used = int((rows > 0).any(0).any(0).sum())
        assert cost.read_bytes == 2 * 4 * queries * 8 * 4 + 2 * 2 * used * (8 + 16) * 4
        assert cost.write_bytes == 2 * 4 * queries * 16 * 4


def test_cost_does_not_loop_over_a_million_tokens():
    for name, options in PATTERNS:
        backend(name, **options).cost(Shape(1, 32, 8, 100_000, 100_000, 128))


def rope(q, k, at_q, at_k):
    def turn(x, at):
        angle = at[..., None].to(x) * torch.logspace(0, -2, x.shape[-1] // 2, dtype=x.dtype)
        angle = angle[:, None] if angle.ndim == 3 else angle
        a, b = x.chunk(2, dim=-1)
        return torch.cat(
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1
        )

    return turn(q, at_q), turn(k, at_k)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_sinks_stand_at_their_place_in_the_cache(impl):
    """Distances by the design's formula, one pair at a time: min(i - j, w + s - 1 - j) for sinks, i
    - j for others.
    """
    window, sinks, dim = 5, 3, 8
    q, k, v = (torch.randn(1, 1, T, dim, dtype=torch.float64) for _ in range(3))
    out = backend("sliding", window=window, sinks=sinks, impl=impl)(q, k, v, rotary=rope)
    for i in range(T):
        scores, values = [], []
        for j in range(i + 1):
            if i - j < window or j < sinks:
                distance = min(i - j, window + sinks - 1 - j) if j < sinks else i - j
                at = torch.tensor([distance])
                turned, _ = rope(
                    q[:, :, i : i + 1],
                    k[:, :, :1],
                    at,
                    at * 0,
                )
                scores.append((turned[0, 0, 0] @ k[0, 0, j]) / math.sqrt(dim))
                values.append(v[0, 0, j])
        torch.testing.assert_close(
            out[0, 0, i], torch.stack(scores).softmax(0) @ torch.stack(values)
        )


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_sink_logits_are_one_more_logit(impl):
    attn = backend("sliding", window=4, sink_logits=True, impl=impl)
    q, k, v = (torch.randn(2, h, T, 8, dtype=torch.float64) for h in (4, 2, 2))
    zero = attn(q, k, v)  # logits 0: one more key with score 0 and value 0
    with torch.no_grad():
        attn.sink_logits.copy_(torch.linspace(-2, 2, 4))
    out = attn(q, k, v)
    plain = backend("sliding", window=4)
    for logits, got in ((torch.zeros(4), zero), (attn.sink_logits.detach(), out)):
        for i in (0, 3, T - 1):
            scores = (
                q[:, :, i : i + 1] @ k.repeat_interleave(2, 1)[:, :, max(0, i - 3) : i + 1].mT
            )[:, :, 0] * 8**-0.5
            weights = torch.cat(
                [scores, logits.double()[None, :, None].expand(2, 4, 1)], -1
            ).softmax(-1)[..., :-1]
            expected = (
                weights[:, :, None] @ v.repeat_interleave(2, 1)[:, :, max(0, i - 3) : i + 1]
            )[:, :, 0]
            torch.testing.assert_close(got[:, :, i], expected)
    assert not torch.allclose(plain(q, k, v), zero)


def test_sink_logits_load_before_the_first_call():
    attn, other = (backend("sliding", window=4, sink_logits=True) for _ in range(2))
    q, k, v = (torch.randn(1, 4, 9, 8) for _ in range(3))
    attn(q, k, v)
    nn.init.normal_(attn.sink_logits)
    other.load_state_dict(attn.state_dict())
    assert torch.equal(other(q, k, v), attn(q, k, v))
    with pytest.raises(ValueError, match="expected 4 heads, as many as sink_logits, got 2"):
        attn(q[:, :2], k[:, :2], v[:, :2])
    assert backend("sliding(window=4, sink_logits=True, heads=3)").sink_logits.shape == (3,)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [2, [0, 5, 20], torch.arange(30) % 9 == 4])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_longformer_global_projections(causal, tokens, side):
    """Global rows by their own q, k and v over everything; the others by the local ones."""
    attn, dense = (
        backend("longformer", window=5, global_tokens=tokens),
        backend("dense", impl="reference"),
    )
    q, k, v = (torch.randn(2, h, T, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    second = tuple(torch.randn_like(x).requires_grad_() for x in (q, k, v))
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, : 4 if side == "left" else 0] = False
    mask[1, T - 4 if side == "right" else T :] = False
    given = None if side == "none" else mask
    out = attn(q, k, v, causal=causal, padding_mask=given, rotary=rope, global_qkv=second)
    local = backend("longformer", window=5, global_tokens=tokens, impl="reference")
    local = local(q, k, v, causal=causal, padding_mask=given, rotary=rope)
    wide = dense(*second, causal=causal, padding_mask=given, rotary=rope)
    positions = torch.where(mask, mask.cumsum(1) - 1, -1)
    rows = attn.is_global(positions)[:, None, :, None]
    expected = torch.where(rows, wide, local) * mask[:, None, :, None]
    torch.testing.assert_close(out * mask[:, None, :, None], expected)
    leaves, loss = (q, k, v, *second), torch.randn_like(expected) * mask[:, None, :, None]
    for a, b in zip(
        torch.autograd.grad(out, leaves, loss),
        torch.autograd.grad(expected, leaves, loss),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tokens", [3, [0, 5, 20]])
@pytest.mark.parametrize("pads", [0, 6])
def test_longformer_decodes_with_global_projections(tokens, pads):
    attn = backend("longformer", window=5, global_tokens=tokens)
    q, k, v = (torch.randn(2, h, 60, 8, dtype=torch.float64) for h in (4, 2, 2))
    second = tuple(torch.randn_like(x) for x in (q, k, v))
    mask = torch.arange(60) >= torch.tensor([[0], [pads]])
    whole = attn(q, k, v, padding_mask=mask if pads else None, rotary=rope, global_qkv=second)
    for chunks in ([1] * 60, [2, 1, 7, 30, 1, 1, 18], [59, 1]):
        state, at, steps = attn.new_state(), 0, []
        for size in chunks:
            part = [x[:, :, at : at + size] for x in (q, k, v, *second)]
            at += size
            steps.append(
                attn(
                    *part[:3],
                    padding_mask=mask[:, :at] if pads else None,
                    state=state,
                    rotary=rope,
                    global_qkv=part[3:],
                )
            )
        got = torch.cat(steps, dim=2).transpose(1, 2)[mask]
        torch.testing.assert_close(got, whole.transpose(1, 2)[mask])
    if isinstance(tokens, int):
        assert state.twin is None  # no global row can come any more, so nothing is kept for one
        with pytest.raises(ValueError, match="global projections were dropped"):
            state.crop(2)


def test_softcap():
    q, k, v = (3 * torch.randn(1, 2, T, 8, dtype=torch.float64) for _ in range(3))
    for name, options in (
        ("dense", {}),
        ("sliding", {"window": 5, "sinks": 2}),
        ("strided", {"stride": 4}),
    ):
        fast, truth = (backend(name, **options, impl=impl) for impl in ("torch", "reference"))
        torch.testing.assert_close(fast(q, k, v, softcap=5.0), truth(q, k, v, softcap=5.0))
        assert not torch.allclose(fast(q, k, v, softcap=5.0), fast(q, k, v))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sliding", "sliding: window must be given"),
        ("sliding(window=0)", "sliding: window: got 0, valid is a whole number of at least 1"),
        ("sliding(window=-3)", "window: got -3"),
        ("sliding(window=4.0)", "window: got 4.0"),
        ("sliding(window=True)", "window: got True"),
        ("sliding(window=4, sinks=-1)", "sinks: got -1, valid is a whole number of at least 0"),
        ("sliding(window=4, dilation=0)", "dilation: got 0"),
        ("sliding(window=4, sinks=1, dilation=2)", "sinks and dilation cannot be combined"),
        ("sliding(window=4, sink=1)", "did you mean 'sinks'"),
        ("block(block=0)", "block: block: got 0"),
        ("block(block=4, look_back=-1)", "look_back: got -1"),
        ("strided(stride=0)", "stride: got 0"),
        ("fixed(stride=4, summary=5)", r"summary: got 5, valid is 1 to stride \(4\)"),
        ("s2(block=5)", "got 5, half a block is shifted; valid is 4 or 6"),
        ("longnet(segments=[4], dilations=[1, 2])", "dilations: got 2 for 1 segments"),
        (
            "longnet(segments=[4], dilations=[3])",
            "got 3 for segments of 4; valid is a divisor of 4",
        ),
        ("longnet(segments=4, dilations=[1])", r"segments: got 4, valid is a list"),
        ("longnet(segments=[0], dilations=[1])", "segments: got 0"),
        ("longformer(window=4, global_tokens=0)", "global_tokens: got 0"),
        (
            "longformer(window=4, global_tokens=[])",
            r"global_tokens: got \[\], valid is a number of first tokens",
        ),
        ("longformer(window=4, global_tokens='all')", "global_tokens: got 'all'"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(ValueError, match=message):
        backend(spec)


def test_bad_calls():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    for spec in ("sliding(window=4)", "longformer(window=4)"):
        with pytest.raises(
            ValueError, match="window: got 4, a bidirectional window is odd; valid is 3 or 5"
        ):
            backend(spec)(q, k, v, causal=False)
    with pytest.raises(Unsupported, match="sinks need causal=True"):
        backend("sliding(window=5, sinks=1)")(q, k, v, causal=False)
    with pytest.raises(Unsupported, match="strided: causal=False is not possible"):
        backend("strided(stride=4)")(q, k, v, causal=False)
    with pytest.raises(ValueError, match=r"dense: argument: got 'softcp' .did you mean 'softcap'"):
        backend("dense")(q, k, v, softcp=1.0)
    with pytest.raises(ValueError, match="longformer: argument: got 'sink_logits'"):
        backend("longformer(window=5)")(q, k, v, sink_logits=torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"global_qkv: expected k \(1, 2, 9, 8\).*got \(1, 2, 5, 8\)"
    ):
        backend("longformer(window=5)")(q, k, v, global_qkv=(q, k[:, :, :5], v))
    state = backend("sliding(window=5)").new_state()
    with pytest.raises(ValueError, match="one float dtype"):
        backend("sliding(window=5)")(q, k, v.double(), state=state)
    assert state.seq_len == 0


@pytest.mark.parametrize(
    "spec", ["sliding(window=7, dilation=3)", "longnet(segments=[8, 24], dilations=[1, 2])"]
)
@pytest.mark.parametrize("pads", [None, "left", "right"])
def test_long_sequences_are_taken_in_pieces(spec, pads, monkeypatch):
    """What the pieces of a CPU give is what the whole gives, also for queries that are the last
    tokens only.
    """
    attn, real = backend(spec), torch.arange(100)[None]
    mask = {
        None: None,
        "left": real >= torch.tensor([[0], [13]]),
        "right": real < torch.tensor([[100], [83]]),
    }[pads]
    k, v = torch.randn(2, 2, 2, 100, 8, dtype=torch.float64)
    for queries in (100, 37):
        q = torch.randn(2, 4, queries, 8, dtype=torch.float64)
        whole = attn(q, k, v, padding_mask=mask)
        for module in (longnet, residues):
            monkeypatch.setattr(module, "MOST", 24)
        torch.testing.assert_close(attn(q, k, v, padding_mask=mask), whole)
        monkeypatch.undo()


def test_memory_is_linear_in_the_length():
    """No tensor of T x T elements is ever made: the largest one a pattern makes at T = 4096."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.most = max(self.most, x.untyped_storage().nbytes())
            return out

    tokens = 4096
    q, k, v = (torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, :5] = False
    for name, options in (
        ("block", {"block": 64}),
        ("sliding", {"window": 64, "sinks": 4}),
        ("sliding", {"window": 9, "dilation": 8}),
        ("s2", {"block": 64}),
        ("longnet", {"segments": [64, 1024], "dilations": [1, 16]}),
        ("longformer", {"window": 63, "global_tokens": 4}),
        ("fixed", {"stride": 64}),
        ("strided", {"stride": 64}),
    ):
        for padding in (None, mask):
            with Largest() as seen:
                backend(name, **options)(q, k, v, padding_mask=padding).sum().backward()
            assert seen.most < tokens * tokens * 4 / 8, name
