"""Attention dropout of the exact patterns, all that there are: the weights that the reference
drops, whatever computes them, and what is refused."""

import pytest
import torch
from test_conformance import ROWS
from torch.utils.checkpoint import checkpoint

import effattn
from effattn.errors import Unsupported
from effattn.positions.registry import rule

EXACT = [
    (name, options, causal)
    for name, rows in ROWS.items()
    if effattn.backends()[name].traits.exact
    for options, both in [*rows, *([({"window": [3, None]}, False)] if name == "sliding" else [])]
    for causal in ((True, False) if both else (True,))
    if effattn.backend(name, **options).traits.exact
]
T = 26


def qkv(tokens=T, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, tokens, 8), (2, tokens, 8), (2, tokens, 8))
    return [
        torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]


def padding():
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[0, :5] = False
    mask[1, -4:] = False
    return mask


def documents():
    return torch.tensor([[0] * 9 + [1] * 8 + [2] * 9, [0] * 17 + [1] * 9])


def run(attn, q, k, v, seed=3, **call):
    """(out, gradients of q, k and v)"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    torch.manual_seed(seed)
    out = attn(q, k, v, **call)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), (q, k, v))


def close(got, true, bound=1e-12):
    for x, y in zip(got, true, strict=True):
        assert (x - y).norm() < bound * y.norm()


@pytest.mark.parametrize("beside", ["nothing", "padding", "documents"])
@pytest.mark.parametrize(("name", "options", "causal"), EXACT)
def test_the_reference_drops_the_same(name, options, causal, beside):
    call = {"causal": causal, "dropout": 0.3}
    call |= {"padding": {"padding_mask": padding()}, "documents": {"documents": documents()}}.get(
        beside, {}
    )
    found = [
        run(effattn.backend(name, **options, impl=impl), *qkv(), **call)
        for impl in ("torch", "reference")
    ]
    close(*found)


@pytest.mark.parametrize("spec", ["rope", "rerope(window=6)", "alibi", "logn"])
def test_with_position_rules(spec):
    made = rule(spec, head_dim=8, heads=4, length=16)
    found = [
        run(effattn.backend("sliding", window=9, impl=impl), *qkv(), rotary=made, dropout=0.3)
        for impl in ("torch", "reference")
    ]
    close(*found)


@pytest.mark.parametrize(("name", "options", "causal"), EXACT[::3])
def test_its_mean_is_the_output_without(name, options, causal):
    attn, (q, k, v) = effattn.backend(name, **options), qkv(dtype=torch.float32)
    rows, rate = 256, 0.4
    q, k, v = (x[:1].expand(rows, *x.shape[1:]) for x in (q, k, v))
    with torch.no_grad():
        plain = attn(q[:1], k[:1], v[:1], causal=causal)
        torch.manual_seed(0)
        drawn = attn(q, k, v, causal=causal, dropout=rate)
    spread = drawn.std(dim=0) / rows**0.5
    assert ((drawn.mean(dim=0) - plain[0]).abs() < 6 * spread + 1e-6).all()
    assert spread.mean() > 1e-3


def test_torchs_seed_decides_and_two_calls_differ():
    attn, given = effattn.backend("dense"), qkv()
    one, again, other = (run(attn, *given, seed=s, dropout=0.3)[0] for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.manual_seed(1)
    assert not torch.equal(attn(*given, dropout=0.3), attn(*given, dropout=0.3))
    # no rate draws nothing
    before = torch.get_rng_state()
    assert torch.equal(attn(*given, dropout=0.0), attn(*given))
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_changes_nothing():
    attn, (q, k, v) = effattn.backend("sliding", window=7, sinks=2), qkv()
    mask = torch.ones(2, T + 5, dtype=torch.bool)
    mask[:, :5] = False
    wide = [torch.cat([torch.full_like(x[:, :, :5], 7.0), x], dim=2) for x in (q, k, v)]
    torch.manual_seed(4)
    plain = attn(q, k, v, dropout=0.3)
    torch.manual_seed(4)
    close([attn(*wide, padding_mask=mask, dropout=0.3)[:, :, 5:]], [plain])


@pytest.mark.parametrize(("name", "options"), [("dense", {}), ("strided", {"stride": 4})])
def test_a_checkpoint_drops_the_same_again(name, options):
    attn = effattn.backend(name, **options)
    plain = run(attn, *qkv(), dropout=0.3)
    kept = run(
        lambda *x: checkpoint(lambda *y: attn(*y, dropout=0.3), *x, use_reentrant=False), *qkv()
    )
    close(kept, plain, 1e-15)


def test_views_and_one_query_and_a_state():
    q, k, v = qkv()
    attn, truth = (effattn.backend("sliding", window=6, impl=x) for x in ("torch", "reference"))
    wide = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    close(run(attn, *wide, dropout=0.5), run(truth, q, k, v, dropout=0.5))
    states = [one.new_state() for one in (attn, truth)]
    for low, high in ((0, 20), (20, 21), (21, 26)):  # a prompt, a step, a chunk
        outs = []
        for one, state in zip((attn, truth), states, strict=True):
            torch.manual_seed(high)
            part = (x[:, :, low:high] for x in (q, k, v))
            outs.append(one(*part, state=state, dropout=0.5))
        close(*[[out] for out in outs])


def test_long_sequences_of_patterns_in_parts_take_some_queries_at_a_time(monkeypatch):
    from effattn.patterns import defined

    attn, given = effattn.backend("strided", stride=4), qkv()
    whole = run(attn, *given, dropout=0.3)
    monkeypatch.setattr(defined, "SCORES", 8 * T * 5)
    close(run(attn, *given, dropout=0.3), whole, 1e-14)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1 - 1e-9, 2, float("nan"), "0.1", True, None])
def test_what_is_no_rate(rate):
    with pytest.raises(ValueError, match=r"dropout: got .*valid is a number from 0 on, below 1"):
        effattn.backend("dense")(*qkv(), dropout=rate)


@pytest.mark.parametrize(
    "name", [n for n, one in effattn.backends().items() if not one.traits.exact]
)
def test_methods_without_weights_refuse(name):
    options, both = ROWS[name][0]
    attn, causal = effattn.backend(name, **options), both is not None
    given = qkv()
    with pytest.raises(Unsupported, match=rf"dropout: {name} .*valid is 0.0, or an exact pattern"):
        attn(*given, causal=causal, dropout=0.1)
    attn(*given, causal=causal, dropout=0.0)


@pytest.mark.interpreted
@pytest.mark.parametrize("spec", ["dense", "sliding(window=9, sinks=2)", "s2(block=8)"])
def test_triton_drops_the_same(spec):
    given = qkv()
    true = run(effattn.backend(spec, impl="reference"), *given, dropout=0.3)
    got = run(effattn.backend(spec, impl="triton"), *(x.float() for x in given), dropout=0.3)
    close([x.double() for x in got], true, 2e-6)


@pytest.mark.interpreted
def test_triton_refuses_patterns_in_parts():
    with pytest.raises(
        Unsupported, match=r"impl: 'triton' has no dropout for this call of strided"
    ):
        effattn.backend("strided", stride=4, impl="triton")(*qkv(dtype=torch.float32), dropout=0.1)
