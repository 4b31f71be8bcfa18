"""Attention dropout in the flash kernels: which weights are dropped, and that every implementation
drops the same ones, forward and backward, with every rule and layout."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from effattn.kernels import decode
from effattn.kernels.flash import Bias, Dropout, Far, attention, reference
from effattn.kernels.flash.pattern import Blocks, Layout, Pattern, Window, layout_of

HEADS, KV_HEADS, DIM = 4, 2, 8


def drawn(rate=0.3, queries=64, keys=64, rows=2, heads=HEADS, seed=0) -> Dropout:
    torch.manual_seed(seed)
    at = torch.arange(keys)[None]
    return Dropout.drawn(rate, at[:, keys - queries :], at, rows, heads)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.97])
def test_the_rate_is_kept_over_all_pairs_and_along_every_side(rate):
    kept = drawn(rate, 256, 256).factors(torch.float64) > 0
    assert kept.shape == (2, HEADS, 256, 256)
    variance = rate * (1 - rate)
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        count = kept.double().mean(dim=dims)
        each = kept.numel() / count.numel()
        assert (count - (1 - rate)).abs().max() < 5 * (variance / each) ** 0.5


def test_pairs_are_independent_of_each_other():
    """Neighbours among queries, keys, heads, rows and seeds are both dropped as often as chance
    has it."""
    drops = [drawn(0.5, 128, 128, seed=seed).factors(torch.float64) == 0 for seed in (3, 4)]
    (one, other), size = drops, drops[0].numel() ** 0.5
    pairs = [one & other]
    for dim in range(4):
        pairs.append(one & one.roll(1, dim))
    for dim in (2, 3):  # bits of positions that are far apart
        pairs += [one & one.roll(step, dim) for step in (2, 16, 64)]
    assert all(abs(both.double().mean() - 0.25) < 3 / size for both in pairs)


def test_a_seed_decides_and_positions_do_not_depend_on_the_length():
    short, long = drawn(queries=40, keys=40), drawn(queries=64, keys=64)
    assert torch.equal(short.factors(torch.float32), long.factors(torch.float32)[..., :40, :40])
    last = drawn(queries=8, keys=64)
    assert torch.equal(last.factors(torch.float32), long.factors(torch.float32)[:, :, -8:])
    assert not torch.equal(drawn(seed=1).q, drawn(seed=2).q)


def padded(tokens: int) -> Layout:
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, : tokens // 4] = False
    mask[1, :3] = False
    return layout_of(mask)


CASES = {
    "full": {},
    "both ways, padded": dict(causal=False, padding=True),
    "window": dict(pattern=Window(back=9), padding=True),
    "two sides": dict(pattern=Window(back=5, ahead=7), causal=False),
    "sinks": dict(pattern=Window(back=9, first=3), padding=True),
    "other queries for sinks": dict(pattern=Window(back=9, first=3), padding=True, first=True),
    "blocks": dict(pattern=Blocks(size=8, look_back=1), padding=True),
    "shifted blocks": dict(pattern=Blocks(size=8, shifted=True)),
    "softcap": dict(softcap=2.0),
    "far": dict(far=20, padding=True),
    "far window": dict(pattern=Window(back=40), far=20),
    "bias": dict(pattern=Window(back=30, first=2), bias="alibi", padding=True),
    "slots": dict(pattern=Window(back=9, first=4), layout=Layout(slots=4, tail=20), queries=30),
    "a chunk at the end": dict(queries=21),
}


def compare(impl: str, dtype: torch.dtype, tokens: int, case: dict) -> float:
    """The largest relative error of out, lse and all gradients against the fp64 reference with the
    same weights dropped."""
    case = {"pattern": Pattern(), "causal": True, "softcap": None, "queries": tokens} | case
    queries = min(case["queries"], tokens)
    layout = padded(tokens) if case.get("padding") else case.get("layout", Layout())
    generator = torch.Generator().manual_seed(1)

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(2, heads, length, DIM, generator=generator, dtype=torch.float64)

    given = {"q": draw(HEADS, queries), "k": draw(KV_HEADS, tokens), "v": draw(KV_HEADS, tokens)}
    if case.get("first"):
        given["q_first"] = draw(HEADS, queries)
    if case.get("far"):
        given |= {"q_far": draw(HEADS, queries), "k_far": draw(KV_HEADS, tokens)}
    rule = None
    if case.get("bias"):
        rule = Bias(case["bias"], torch.rand(HEADS, 1, generator=generator, dtype=torch.float64))
    i, j = layout.query_positions(queries, tokens, "cpu"), layout.key_positions(tokens, "cpu")
    drop = Dropout.drawn(0.3, i, j, 2, HEADS)
    d_out, d_lse = draw(HEADS, queries), draw(HEADS, queries)[..., 0]
    pattern, causal, found = case["pattern"], case["causal"], []
    for run in ("reference", impl):
        to = torch.float64 if run == "reference" else dtype
        xs = {name: x.to(to).requires_grad_() for name, x in given.items()}
        options = {"scale": 0.5, "softcap": case["softcap"], "q_first": xs.get("q_first")}
        options |= {"bias": rule, "drop": drop}
        if case.get("far"):
            options["far"] = Far(xs["q_far"], xs["k_far"], case["far"])
        if run == "reference":
            h = torch.arange(HEADS)[:, None, None]
            counts = pattern.sees(i[:, None, :, None], j[:, None, None], h, HEADS, causal)
            options["first"] = (j >= 0) & (j < pattern.first)
            options["distance"] = i[:, :, None] - j[:, None]
            out, lse = reference.attention(xs["q"], xs["k"], xs["v"], counts, **options)
        else:
            options |= {"causal": causal, "impl": impl, "lse": True}
            out, lse = attention(xs["q"], xs["k"], xs["v"], pattern, layout, **options)
        sums = torch.where(lse.isfinite(), lse, 0.0)
        loss = (out * d_out.to(to)).sum() + (sums * d_lse.to(sums.dtype)).sum()
        found.append([out.detach(), sums.detach(), *torch.autograd.grad(loss, [*xs.values()])])
    true, got = found
    return max((x - y).norm().item() / x.norm().item() for x, y in zip(true, got, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_torch_drops_what_the_reference_does(case):
    assert compare("torch", torch.float64, 77, CASES[case]) < 1e-13


@pytest.mark.interpreted
@pytest.mark.parametrize("case", CASES)
def test_triton_drops_what_the_reference_does(case):
    assert compare("triton", torch.float32, 49, CASES[case]) < 2e-6


def test_the_log_sum_exp_is_that_of_all_pairs_and_no_rate_changes_nothing():
    q, k, v = (torch.randn(2, h, 64, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    plain = attention(q, k, v, impl="torch", lse=True)
    dropped = attention(q, k, v, impl="torch", lse=True, drop=drawn(0.5))
    kept = attention(q, k, v, impl="torch", lse=True, drop=drawn(0.0))
    torch.testing.assert_close(dropped[1], plain[1])
    torch.testing.assert_close(kept, plain)
    assert not torch.allclose(dropped[0], plain[0], atol=1e-2)


def test_half_precision_and_several_threads_of_heads():
    q, k, v = (torch.randn(2, h, 300, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    drop = drawn(0.2, 300, 300)
    true = attention(q, k, v, Window(back=40), impl="torch", drop=drop)
    half = [x.bfloat16() for x in (q, k, v)]
    got = attention(*half, Window(back=40), impl="torch", drop=drop)
    assert got.dtype == torch.bfloat16
    assert (got - true).norm() < 0.01 * true.norm()


def test_the_decode_kernels_have_it_in_torch_alone():
    q, k, v = torch.randn(1, HEADS, 3, DIM), *torch.randn(2, 1, KV_HEADS, 40, DIM)
    drop = drawn(0.4, 3, 40, rows=1)
    out = decode.attention(q, k, v, drop=drop, impl="torch")
    h = torch.arange(HEADS)[:, None, None]
    counts = Pattern().sees(torch.arange(37, 40)[:, None], torch.arange(40), h, HEADS, True)
    true, _ = reference.attention(q, k, v, counts, scale=DIM**-0.5, drop=drop)
    torch.testing.assert_close(out, true)
    with pytest.raises(ValueError, match=r"drop: .*valid is impl='torch'"):
        decode.attention(q, k, v, drop=drop, impl="triton")
