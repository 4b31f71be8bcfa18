"""`effattn.flex_attention` against torch's own (eager) and against the definition in fp64, forward
and backward, on the examples that torch documents."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex

import effattn
from effattn.kernels.flex.probes import by_distance, is_additive
from effattn.kernels.flex.reference import flex_attention as reference

TOKENS, BATCH, HEADS, KV_HEADS, DIM = 150, 2, 4, 2, 8
SIZE = 32  # of a block
DOCUMENT = torch.arange(TOKENS) // 37
SLOPES = torch.exp2(-torch.arange(1, HEADS + 1).float())
LEARNED = torch.randn(
    2 * TOKENS, HEADS, generator=torch.Generator().manual_seed(9), dtype=torch.float64
).requires_grad_()


def causal(b, h, q, k):
    return q >= k


def sliding(b, h, q, k):
    return (q >= k) & (q - k <= 40)


def document(b, h, q, k):
    return (DOCUMENT[q] == DOCUMENT[k]) & (q >= k)


def prefix(b, h, q, k):
    return (k < 20) | (q >= k)


def every_other_block(b, h, q, k):
    return (q >= k) & ((q // SIZE - k // SIZE) % 2 == 0)


def by_row_and_head(b, h, q, k):
    return (q >= k + b) & (q - k <= (h + 1) * 20)


def some_see_nothing(b, h, q, k):
    return (q >= k) & (q >= 70)


MASKS = {
    "all": None,
    "causal": causal,
    "sliding": sliding,
    "document": document,
    "prefix": prefix,
    "every other block": every_other_block,
    "by row and head": by_row_and_head,
    "some see nothing": some_see_nothing,
}


def alibi(score, b, h, q, k):
    return score + SLOPES[h] * (k - q)


def softcap(score, b, h, q, k):
    return 2 * torch.tanh(score / 2)


def relative(score, b, h, q, k):
    return score + (q - k) / 50


def causal_score(score, b, h, q, k):
    return torch.where(q >= k, score, -float("inf"))


def learned_bias(score, b, h, q, k):
    return score * 1.5 + LEARNED[q - k + TOKENS, h].to(score.dtype)


SCORES = {
    "alibi": alibi,
    "softcap": softcap,
    "relative": relative,
    "causal score": causal_score,
    "learned bias": learned_bias,
}
CASES = [(mask, None) for mask in MASKS]
CASES += [(mask, score) for score in SCORES for mask in ("all", "sliding", "by row and head")]


def mask_of(name: str):
    mask_mod = MASKS[name]
    if mask_mod is None:
        return None
    own = (BATCH, HEADS) if name == "by row and head" else (None, None)
    return create_block_mask(mask_mod, *own, TOKENS, TOKENS, device="cpu", BLOCK_SIZE=SIZE)


def inputs(dtype=torch.float64, kv_heads=KV_HEADS, value_dim=DIM, queries=TOKENS):
    draw = torch.Generator().manual_seed(0)
    shapes = (HEADS, queries, DIM), (kv_heads, TOKENS, DIM), (kv_heads, TOKENS, value_dim)
    found = [torch.randn(BATCH, *shape, generator=draw, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in found]


def both_ways(run, leaves, lse: bool):
    """Output and gradients; with `lse` through the log-sum-exp too."""
    out, sums = run()
    loss = (out.double() * torch.linspace(-1, 1, out.numel()).view_as(out).double()).sum()
    if lse:
        loss = loss + torch.where(sums == -torch.inf, 0.0, sums).double().sin().sum()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [out.detach(), sums.detach(), *grads]


@pytest.mark.parametrize(("mask", "score"), CASES)
def test_as_defined_and_as_torch_does_it(mask, score):
    block_mask, score_mod = mask_of(mask), SCORES.get(score)
    leaves = [*inputs(), LEARNED] if score == "learned bias" else inputs()
    options = dict(score_mod=score_mod, block_mask=block_mask, enable_gqa=True)
    got = both_ways(
        lambda: effattn.flex_attention(*leaves[:3], **options, return_lse=True), leaves, True
    )
    mask_mod = MASKS[mask]
    want = both_ways(lambda: reference(*leaves[:3], score_mod, mask_mod), leaves, True)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        theirs = torch_flex(*(x.detach() for x in leaves[:3]), **options)
    torch.testing.assert_close(got[0], theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", [None, "alibi"])
def test_other_precisions(dtype, score):
    """At most twice the error of plain torch in the same dtype, both against fp64."""
    leaves, score_mod, mask = inputs(dtype, HEADS), SCORES.get(score), mask_of("sliding")
    options = dict(score_mod=score_mod, block_mask=mask)
    got = both_ways(
        lambda: effattn.flex_attention(*leaves, **options, return_lse=True), leaves, False
    )
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = both_ways(lambda: reference(*wide, score_mod, sliding), wide, False)
    i = torch.arange(TOKENS)
    bias = torch.where(sliding(0, 0, i[:, None], i), 0.0, -torch.inf)
    if score:
        bias = bias + SLOPES[:, None, None] * (i - i[:, None])
    plain = both_ways(lambda: (_plain(*leaves, bias.to(dtype)), got[1]), leaves, False)
    assert got[0].dtype == dtype
    for place in (0, 2, 3, 4):
        error, theirs = (relative_error(x[place], want[place]) for x in (got, plain))
        assert error <= max(2 * theirs, 0.005), (place, error, theirs)


def _plain(q, k, v, bias):
    return torch.softmax(q @ k.mT * DIM**-0.5 + bias, dim=-1) @ v


def relative_error(got, want) -> float:
    return float((got.double() - want).norm() / want.norm())


def test_strides_odd_lengths_and_other_widths():
    q, k, v = inputs(value_dim=5, queries=61)
    mask = create_block_mask(prefix, None, None, 61, TOKENS, device="cpu", BLOCK_SIZE=SIZE)
    want = effattn.flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    assert want.shape == (BATCH, HEADS, 61, 5)
    views = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    views.append(v.detach().mT.contiguous().mT)
    got = effattn.flex_attention(*views, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(want, reference(q, k, v, None, prefix)[0])
    # without gradients, and with a scale of one's own
    with torch.no_grad():
        scaled = effattn.flex_attention(q, k, v, scale=0.1, enable_gqa=True)
    torch.testing.assert_close(scaled, reference(q, k, v, None, None, scale=0.1)[0])


def test_a_mask_made_by_hand_hides_whole_blocks():
    """What its tables leave out is not seen, whatever mask_mod says, and full blocks are not asked
    for it."""
    counts = torch.tensor([1, 1, 0]).view(1, 1, 3)
    indices = torch.tensor([[0, 1, 2], [2, 0, 1], [0, 1, 2]]).view(1, 1, 3, 3)
    full = torch.tensor([0, 1, 1]).view(1, 1, 3)
    full_indices = torch.tensor([[0, 1, 2], [0, 1, 2], [1, 0, 2]]).view(1, 1, 3, 3)
    mask = BlockMask.from_kv_blocks(
        counts, indices, full, full_indices, BLOCK_SIZE=50, mask_mod=causal, seq_lengths=(150, 150)
    )
    q, k, v = inputs()
    i = torch.arange(TOKENS)
    seen = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    seen[:50, :50] = seen[50:100, 100:] = True
    seen &= i[:, None] >= i
    seen[50:100, :50] = seen[100:, 50:100] = True
    want, _ = reference(q, k, v, None, lambda b, h, q, k: seen[q, k])
    for score in (None, lambda s, b, h, q, k: s):
        got = effattn.flex_attention(q, k, v, score, mask, enable_gqa=True)
        torch.testing.assert_close(got, want)


class Bias(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(HEADS, dtype=torch.float64))

    def forward(self, score, b, h, q, k):
        return score * self.table[h]


def test_gradients_of_what_a_score_mod_takes_from_around_it():
    q, k, v = inputs()
    weight = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    twice = weight * 2  # no leaf

    def scaled(score, b, h, q, k, by=None):
        return score * (twice if by is None else by)[h]

    def nested(*given):
        return scaled(*given)

    bias = Bias()
    for mod, leaf in (
        (nested, weight),
        (functools.partial(scaled, by=weight), weight),
        (bias, bias.table),
        (bias.forward, bias.table),
    ):
        got, want = (
            torch.autograd.grad(out.square().sum(), leaf, retain_graph=True)[0]
            for out in (
                effattn.flex_attention(q, k, v, mod, mask_of("causal"), enable_gqa=True),
                reference(q, k, v, mod, causal)[0],
            )
        )
        torch.testing.assert_close(got, want)

    class Hidden:
        __slots__ = ("by",)

        def __call__(self, score, b, h, q, k):
            return score * self.by[h]

    hidden = Hidden()
    hidden.by = weight
    with pytest.raises(ValueError, match="score_mod: it uses a tensor that asks for gradients"):
        effattn.flex_attention(q, k, v, hidden, enable_gqa=True)
    with torch.no_grad():
        effattn.flex_attention(q, k, v, hidden, enable_gqa=True)


def test_what_only_adds_is_known():
    """Else it would be computed at a score of 0 alone."""
    q = torch.zeros(())
    adds = (
        alibi,
        relative,
        causal_score,
        lambda s, b, h, q, k: 1 + s - q,
        lambda s, b, h, q, k: torch.add(SLOPES[h], s),
        lambda s, b, h, q, k: torch.where(q > k, s + 1, s),
    )
    others = (
        softcap,
        learned_bias,
        lambda s, b, h, q, k: s * 2,
        lambda s, b, h, q, k: -s,
        lambda s, b, h, q, k: q - s,
        lambda s, b, h, q, k: s + s,
        lambda s, b, h, q, k: torch.add(s, q, alpha=2) * 1.0,
        lambda s, b, h, q, k: torch.where(s > 0, s, s + 1),
        lambda s, b, h, q, k: torch.where(q > k, s, 0.0),
        lambda s, b, h, q, k: torch.where(q > k, s, SLOPES[h]),
        lambda s, b, h, q, k: s + 1 if s > 0 else s,
        lambda s, b, h, q, k: s.exp(),
        lambda s, b, h, q, k: q,
    )
    assert all(is_additive(mod, q) for mod in adds)
    assert not any(is_additive(mod, q) for mod in others)


def test_what_goes_by_the_distance_is_known():
    """Else one tile's mask would be taken for another's."""
    q = torch.zeros(())
    alike = (
        causal,
        sliding,
        lambda b, h, q, k: (k - q > -7) | (h == 1),
        lambda b, h, q, k: q == k,
    )
    others = (
        document,
        prefix,
        every_other_block,
        by_row_and_head,
        some_see_nothing,
        lambda b, h, q, k: q - 1 >= k,
        lambda b, h, q, k: q >= 0,
        lambda b, h, q, k: torch.ge(q, k),
        lambda b, h, q, k: q - q >= k - k,
        lambda b, h, q, k: q if q > 3 else k,
    )
    assert all(by_distance(mod, q) for mod in alike)
    assert not any(by_distance(mod, q) for mod in others)
    assert all(by_distance(mod, q, score=True) for mod in (alibi, relative, causal_score))
    assert not by_distance(lambda s, b, h, q, k: s + q / 5, q, score=True)


def test_what_does_not_fit():
    q, k, v = inputs()
    mask = mask_of("causal")
    for given, options, message in (
        ((q[0], k, v), {}, r"query: expected \(batch, heads, tokens, head_dim\)"),
        ((q, k.float(), v), {}, "expected one float dtype"),
        ((q, k, v[:, :1]), {}, r"value: expected \(2, 2, 150, value_dim\)"),
        ((q, k[..., :4], v), {}, r"key: expected \(2, kv_heads, keys, 8\)"),
        ((q, k, v), {}, "query: got 4 heads for 2 of key, valid is 2, or enable_gqa=True"),
        ((q[:, :, :99], k, v), {"block_mask": mask, "enable_gqa": True}, "block_mask: got one of"),
        ((q, k, v), {"block_mask": causal, "enable_gqa": True}, "block_mask: got function"),
    ):
        with pytest.raises(ValueError, match=message):
            effattn.flex_attention(*given, **options)
