"""Position rules by themselves: formulas against their definitions and transformers' own, and
scores pair by pair.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import effattn
from effattn import positions
from effattn.errors import Unsupported
from effattn.positions.alibi import slopes
from effattn.positions.base import Trained, spec_of
from effattn.positions.extrapolation import (
    critical_base,
    critical_dimension,
    extrapolation_limit,
    wavelengths,
)

T, DIMS = 2048, 128
THETA = 10000.0 ** (-torch.arange(0, DIMS, 2, dtype=torch.float64) / DIMS)


def rule(spec, length=T, head_dim=DIMS, heads=4, **options):
    return positions.rule(spec, length=length, head_dim=head_dim, heads=heads, **options)


def frequencies(spec, length=None, **options):
    return rule(spec, **options).rope(length).inv_freq.double()


LONG = [1 + i / 7 for i in range(DIMS // 2)]
SHARED = {  # what transformers has too: the spec, its parameters, and the lengths to ask for
    "pi(factor=8)": ({"rope_type": "linear", "factor": 8.0}, [None]),
    "dynamic_ntk(factor=3)": ({"rope_type": "dynamic", "factor": 3.0}, [None, 100, T + 1, 5 * T]),
    "yarn(factor=4)": ({"rope_type": "yarn", "factor": 4.0}, [None]),
    "yarn(length=65536, fast=16, slow=2)": (
        {"rope_type": "yarn", "factor": 32.0, "beta_fast": 16.0, "beta_slow": 2.0},
        [None],
    ),
    "llama3(factor=8)": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        [None],
    ),
    "ntk_by_parts(factor=8)": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 32.0},
        [None],
    ),
    f"longrope(factor=8, long_factor={LONG})": (
        {"rope_type": "longrope", "factor": 8.0, "long_factor": LONG, "short_factor": [1.0] * 64},
        [None, T, T + 1],
    ),
}


@pytest.mark.parametrize("spec", SHARED)
def test_agrees_with_transformers(spec):
    parameters, lengths = SHARED[spec]
    more = (
        {}
        if parameters["rope_type"] in ("linear", "dynamic")
        else {"original_max_position_embeddings": T}
    )
    config = transformers.LlamaConfig(
        hidden_size=2 * DIMS,
        num_attention_heads=2,
        max_position_embeddings=T,
        rope_parameters={"rope_theta": 10000.0, **parameters, **more},
    )
    for length in lengths:
        expected, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
            config, "cpu", seq_len=length
        )
        rope = rule(spec).rope(length)
        torch.testing.assert_close(rope.inv_freq, expected, rtol=1e-6, atol=0)
        assert rope.attention_scaling == pytest.approx(scaling, rel=1e-12)


def test_frequencies_by_definition():
    m = torch.arange(1, 65, dtype=torch.float64)
    turns = T * THETA / (2 * math.pi)
    keep = ((turns - 1) / 31).clamp(0, 1)
    cut = 2 * math.pi / 512
    for spec, expected in {
        "rope": THETA,
        "abf(base=5e5)": 5e5 ** (-torch.arange(0, DIMS, 2, dtype=torch.float64) / DIMS),
        "ntk(factor=8)": (10000 * 8 ** (128 / 126))
        ** (-torch.arange(0, DIMS, 2, dtype=torch.float64) / DIMS),
        "ntk(factor=8, variant='fixed')": THETA * 8 ** (-m / 64),
        "ntk(factor=8, variant='mixed')": THETA * torch.exp(-math.log(8) / 64**0.625 * m**0.625),
        "ntk(length=16384, variant='mixed', power=0.75)": THETA
        * torch.exp(-math.log(8) / 64**0.75 * m**0.75),
        "ntk_by_parts(factor=8, temperature=True)": (1 - keep) * THETA / 8 + keep * THETA,
        "power(kappa=0.5)": THETA
        * (1 - torch.arange(0, DIMS, 2, dtype=torch.float64) / DIMS) ** 0.5,
        "truncated(length=512)": torch.tensor(
            [0 if x < cut / 8 else cut / 16 if x < cut else x for x in THETA.tolist()],
            dtype=torch.float64,
        ),
    }.items():
        torch.testing.assert_close(frequencies(spec), expected, rtol=1e-6, atol=0), spec
    old = frequencies("ntk(factor=8)")
    assert old[0] == 1
    assert old[-1] * 8 == pytest.approx(float(THETA[-1]), rel=1e-6)
    assert (
        rule("ntk_by_parts(factor=8, temperature=True)").rope().attention_scaling
        == 0.1 * math.log(8) + 1
    )
    assert rule("ntk_by_parts(factor=8)").rope().attention_scaling == 1
    apart = (
        (frequencies("yarn(factor=8)") / frequencies("ntk_by_parts(factor=8)")).log().abs().max()
    )
    assert 0.3 < apart < 1  # two ramps that are not the same


@pytest.mark.parametrize("spec", ["dynamic_ntk(factor=3)", "dynamic_pi", "dynamic_yarn"])
def test_rows_of_unlike_lengths_have_their_own_frequencies(spec):
    lengths = (T // 2, T, 3 * T)
    rows = rule(spec).rope(torch.tensor(lengths))
    scaling = torch.as_tensor(rows.attention_scaling).broadcast_to(3)
    for row, scaled, length in zip(rows.inv_freq, scaling, lengths, strict=True):
        torch.testing.assert_close(row.double(), frequencies(spec, length), rtol=1e-6, atol=0)
        assert float(scaled) == pytest.approx(rule(spec).rope(length).attention_scaling)


@pytest.mark.parametrize("spec", ["pi", "yarn", "yarn(fast=16, slow=2)"])
def test_a_dynamic_rule_is_the_fixed_one_at_every_length(spec):
    """s = max(1, L / T), YaRN's paper, section 3.4; up to T nothing changes."""
    dynamic = rule("dynamic_" + spec)
    options = spec.partition("(")[2].rstrip(")")
    for length in (None, 1, T, T + 1, 3 * T, 7 * T + 5):
        found = dynamic.rope(length)
        if length is None or length <= T:
            torch.testing.assert_close(found.inv_freq.double(), THETA, rtol=1e-6, atol=0)
            assert found.attention_scaling == 1
            continue
        given = f"length={length}" + (f", {options}" if options else "")
        fixed = rule(f"{spec.partition('(')[0]}({given})").rope()
        torch.testing.assert_close(found.inv_freq, fixed.inv_freq, rtol=1e-6, atol=0)
        assert found.attention_scaling == pytest.approx(fixed.attention_scaling, rel=1e-12)


def test_anchors_of_extrapolation():
    assert critical_dimension(1e4, 128, 4096) == 92  # LLaMA-2
    assert sum(w <= 4096 for w in wavelengths(1e4, 128)) * 2 == 92
    assert extrapolation_limit(1e4, 128, 4096, 1e6, 4096) == pytest.approx(129_027, abs=1)
    assert critical_base(1e4, 4096, 16384) == pytest.approx(71_738, abs=1)
    assert extrapolation_limit(1e4, 128, 4096, 2e4, 16384) == 16384


def test_slopes():
    torch.testing.assert_close(slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]  # those of 4, and every other one of 8
    torch.testing.assert_close(slopes(6), torch.tensor(expected))


def turned(q, k, distance, theta, position=None):
    """(R^position q) . k, pair by pair: Re(q conj(k) e^(i theta position)). q, k (B, H, T, D) with
    halves that turn.
    """
    half = len(theta)
    (a, b), (c, d) = (
        (x[..., :half], x[..., half : 2 * half]) for x in (q[:, :, :, None], k[:, :, None])
    )
    pairs = torch.complex(a, b) * torch.complex(c, d).conj()
    angle = (distance if position is None else position)[..., None].double() * theta
    rest = (q[..., 2 * half :][:, :, :, None] * k[..., 2 * half :][:, :, None]).sum(-1)
    return (pairs * torch.polar(torch.ones_like(angle), angle)), rest


def scores(spec, one, q, k, i, j, scale):
    """Scaled scores of every pair from the definitions, (B, H, Tq, Tk), fp64."""
    distance, length = (i[:, None] - j[None]).double(), one.trained.length
    rope = one.rope() if one.turns else None
    theta = torch.zeros(0, dtype=torch.float64) if rope is None else rope.inv_freq.double()
    position = distance
    if one.far is not None:
        slow = one.far.slow
        position = torch.where(
            distance < one.far.window, distance, one.far.window + (distance - one.far.window) / slow
        )
    pairs, rest = turned(q, k, distance, theta, position)
    if spec.startswith("xpos"):
        zeta = (torch.arange(len(theta)) * 2 + 0.4 * 2 * len(theta)) / (1.4 * 2 * len(theta))
        pairs = pairs * zeta.double() ** (distance[..., None] / 512)
    found = (pairs.real.sum(-1) * (1 if rope is None else rope.attention_scaling**2) + rest) * scale
    if one.scale is not None:
        trained = "trained=True, length=5" in spec
        grown = torch.log(i.double() + 1) / math.log(5 if trained else length)
        found = found * (grown if trained else grown.clamp(min=1))[:, None]
    heads = q.shape[1]
    far = distance.abs()
    if "alibi" in spec:
        found = found - slopes(heads)[:, None, None].double() * far
    if "kerple" in spec:
        r1, r2 = one.learned.double()[:, :, None, None].unbind(1)
        found = found - (r1 * far**r2 if "power" in spec else r1 * torch.log(1 + r2 * far))
    if "sandwich" in spec:
        sines = sum(torch.cos(far * 1e4 ** (-2 * n / 128)) for n in range(64))
        found = found + torch.stack([heads / (8 * h) * sines for h in range(1, heads + 1)])
    if "t5" in spec:
        from transformers.models.t5.modeling_t5 import T5Attention

        bucket = T5Attention._relative_position_bucket(
            -distance.long(), False, one.bias.buckets, one.bias.max_distance
        )
        found = found + one.learned.double()[:, bucket]
    return found


PAIRWISE = [
    "rope",
    "yarn(factor=4)",
    "nope",
    "logn",
    "logn(trained=True, length=5)",
    "rerope(window=6)",
    "rerope(window=1)+logn",
    "leaky_rerope(window=6, k=4)+logn",
    "yarn(factor=4)+rerope(window=6)",
    "alibi",
    "rope+alibi",
    "kerple",
    "kerple(kind='power', r1=0.3, r2=0.6)",
    "sandwich",
    "t5(buckets=8, max_distance=12)",
    "xpos",
]


@pytest.mark.parametrize("spec", PAIRWISE)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_scores_pair_by_pair(spec, impl):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 23, 12, dtype=torch.float64, generator=draw) for h in (4, 2, 2))
    one = rule(spec, length=8, head_dim=12, dims=8).requires_grad_(False)
    if spec.startswith("t5"):
        one.learned.normal_(generator=draw)
    attn, i = effattn.backend("dense", impl=impl), torch.arange(23)
    weights = scores(spec, one, q, k.repeat_interleave(2, 1), i, i, 12**-0.5)
    weights = weights.masked_fill(i[:, None] < i, -math.inf).softmax(-1)
    expected = weights @ v.repeat_interleave(2, 1)
    near = {"rtol": 1e-5, "atol": 1e-5} if spec == "sandwich" else {}  # its table is float32
    torch.testing.assert_close(attn(q, k, v, rotary=one), expected, **near)
    tail = attn(q[:, :, -5:], k, v, rotary=one)  # few queries: keys are turned when they are read
    torch.testing.assert_close(tail, expected[:, :, -5:], **near)
    if not one.causal_only and one.bias is not None:
        both = scores(spec, one, q, k.repeat_interleave(2, 1), i, i, 12**-0.5).softmax(-1)
        if "t5" not in spec:  # T5's own bidirectional form has other buckets
            torch.testing.assert_close(
                attn(q, k, v, causal=False, rotary=one), both @ v.repeat_interleave(2, 1), **near
            )


def test_interleaved_pairs_are_a_permutation():
    q, k, v = torch.randn(3, 1, 2, 20, 8, dtype=torch.float64)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    attn = effattn.backend("dense")
    for spec in ("leaky_rerope(window=4, k=2)", "xpos"):
        halves = attn(q, k, v, rotary=rule(spec, length=8, head_dim=8))
        pairs = attn(
            q[..., order],
            k[..., order],
            v,
            rotary=rule(spec, length=8, head_dim=8, interleaved=True),
        )
        torch.testing.assert_close(pairs, halves)


def test_invariants_of_rerope():
    q, k, v = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64)
    attn = effattn.backend("dense", impl="torch")

    def run(spec, q=q, k=k, v=v):
        return attn(q, k, v, rotary=rule(spec, length=64, head_dim=8, heads=2))

    plain = run("rope")
    torch.testing.assert_close(run("leaky_rerope(window=5, k=1)"), plain)
    torch.testing.assert_close(
        run("leaky_rerope(window=5, k=1e9)"), run("rerope(window=5)"), rtol=1e-6, atol=1e-6
    )
    assert (run("rerope(window=5)") - plain).abs().max() > 1e-2
    torch.testing.assert_close(run("rerope(window=30)"), plain)  # no pair is that far


def test_gradients():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, 20, 4, dtype=torch.float64, generator=draw, requires_grad=True)
        for _ in range(3)
    )
    attn = effattn.backend("dense", impl="torch")
    for spec in ("leaky_rerope(window=3, k=2)+logn", "kerple"):
        one = rule(spec, length=8, head_dim=4, heads=2).double()
        parameters = list(one.parameters())
        assert bool(parameters) == (spec == "kerple")

        def run(q, k, v, *_, one=one):
            return attn(q, k, v, rotary=one).sum(-1)

        assert torch.autograd.gradcheck(run, (q, k, v, *parameters), fast_mode=True)


MISTAKES = [
    ("rrope(window=4)", ValueError, "did you mean 'rope'|did you mean 'rerope'"),
    ("rerope(windw=4)", ValueError, "rerope: option: got 'windw' .did you mean 'window'"),
    ("rerope", ValueError, "rerope: window must be given, for example rerope"),
    (
        "rerope(window=0)",
        ValueError,
        "rerope: window: got 0, valid is a whole number of at least 1",
    ),
    (
        "leaky_rerope(window=4, k=0.5)",
        ValueError,
        "leaky_rerope: k: got 0.5, valid is a number of at least 1",
    ),
    ("pi(factor=0.5)", ValueError, "pi: factor: got 0.5, valid is a number of at least 1"),
    ("dynamic_ntk(factor=0)", ValueError, "dynamic_ntk: factor: got 0"),
    ("yarn", ValueError, "yarn: got neither of factor and length"),
    ("yarn(factor=2, length=9)", ValueError, "yarn: got both of factor and length"),
    ("yarn(factor=2, fast=1, slow=3)", ValueError, "yarn: fast: got 1, valid is a number above 3"),
    ("ntk(length=100)", ValueError, "ntk: length: got 100, shorter than the 2048 tokens"),
    ("abf(base=1e6, length=100)", ValueError, "abf: length: got 100, shorter than the 2048 tokens"),
    ("abf(base=1)", ValueError, "abf: base: got 1, valid is a number above 1"),
    ("ntk(factor=2, variant='mixd')", ValueError, "ntk: variant: got 'mixd' .did you mean 'mixed'"),
    (
        "longrope(factor=2, long_factor=[1, 2])",
        ValueError,
        "long_factor: got 2 numbers, valid is 64",
    ),
    ("longrope(factor=2)", ValueError, "longrope: long_factor: got"),
    ("longrope(factor=2, search=0)", ValueError, r"got \(\) with search=0; valid is .* search of"),
    ("longrope(search=-1)", ValueError, "longrope: search: got -1"),
    (
        "kerple(kind='power', r2=3)",
        ValueError,
        "kerple: r2: got 3, valid for kind='power' is at most 2",
    ),
    ("t5(buckets=32, max_distance=9)", ValueError, "t5: max_distance: got 9"),
    ("pi(factor=2)+yarn(factor=2)", ValueError, "pi and yarn decide the same; valid is one"),
    ("rerope(window=4)+alibi", Unsupported, "rerope and alibi both decide what far pairs see"),
    ("rerope(window=4)+nope", Unsupported, "nope is not a rotation"),
    ("dynamic_ntk(factor=2)+rerope(window=4)", Unsupported, "dynamic_ntk changes with the length"),
    ("logn + ", ValueError, "cannot be parsed"),
    ("pi(4)", ValueError, "4 has no name"),
    (3, ValueError, "got int, valid is a string"),
]


@pytest.mark.parametrize(("spec", "error", "message"), MISTAKES)
def test_mistakes(spec, error, message):
    with pytest.raises(error, match=message):
        rule(spec)


def test_windows_that_will_not_work_are_said_so():
    with pytest.warns(
        UserWarning, match=r"window=2048 is not below the 2048 tokens .* works best, 512 to 1024"
    ):
        rule("rerope(window=2048)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule("rerope(window=1024)")


def test_specs():
    for spec in (
        "rope",
        "leaky_rerope(window=4, k=8.0)",
        "abf(base=5.5)",
        "longrope(factor=2.0, long_factor=[1.5])",
    ):
        assert spec_of(positions.parse(spec)) == spec
    assert (
        rule("logn + rerope(window=4)+abf(base=1e+6)").spec
        == "abf(base=1000000.0)+rerope(window=4)+logn"
    )
    assert {"pi", "ntk", "yarn", "rerope", "t5"} <= positions.rules().keys()
    with pytest.raises(
        Unsupported, match="'pi' turns queries and keys, and these layers have no rotary positions"
    ):
        positions.Positions(positions.parse("pi(factor=2)"), Trained(64, 4, 8, 0))
    with pytest.raises(ValueError, match="dims: got 9"):
        rule("rope", head_dim=8, dims=9)
    with pytest.raises(AttributeError, match="has no attribute 'rul'; it has"):
        positions.rul  # noqa: B018


def test_what_other_backends_can_have():
    q, k, v = torch.randn(3, 1, 2, 12, 8)
    far = rule("rerope(window=3)", length=8, head_dim=8, heads=2)
    for pattern, message in (
        ("lsh", "'rerope.window=3.' decides scores pair by pair, which lsh does not"),
        ("topk(window=2)", "which topk does not compute; valid are exact patterns"),
    ):
        with pytest.raises(Unsupported, match=message):
            effattn.backend(pattern)(q, k, v, rotary=far)
    with pytest.raises(Unsupported, match="needs causal=True"):
        effattn.backend("dense")(q, k, v, causal=False, rotary=far)
    varies = rule("dynamic_ntk(factor=2)", length=8, head_dim=8)
    for pattern in ("lsh", "linear"):
        attn = effattn.backend(pattern)
        assert attn(q, k, v, rotary=varies).isfinite().all()
        with pytest.raises(
            Unsupported,
            match=f"turns old keys anew as a sequence grows, and {pattern} remembers no raw",
        ):
            attn(q, k, v, rotary=varies, state=attn.new_state())
    twice = effattn.backend("strided(stride=3)")(
        q, k, v, rotary=rule("pi(factor=2)", length=8, head_dim=8)
    )
    assert twice.isfinite().all()


def test_the_kernels_take_them():
    """The Triton path of the same calls: whole sequences, and few queries over raw keys."""
    q, k, v = (
        torch.randn(1, h, 18, 16, generator=torch.Generator().manual_seed(h)) for h in (2, 1, 1)
    )
    exact, fast = effattn.backend("dense", impl="torch"), effattn.backend("dense", impl="triton")
    for spec, queries in (
        ("leaky_rerope(window=6, k=2)+logn", 18),
        ("rerope(window=6)", 2),
        ("rope+alibi", 18),
    ):
        one, args = rule(spec, length=8, head_dim=16, heads=2), (q[:, :, -queries:], k, v)
        torch.testing.assert_close(
            fast(*args, rotary=one), exact(*args, rotary=one), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(Unsupported, match="no gradients for learned biases"):
        fast(q, k, v, rotary=rule("kerple", length=8, head_dim=16, heads=2))
