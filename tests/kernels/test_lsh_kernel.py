"""kernels/lsh: places against loops that follow the definition, and both implementations against
the reference.
"""

from __future__ import annotations

import pytest
import torch

from effattn.conformance import relative
from effattn.kernels import lsh
from effattn.kernels.lsh import reference
from effattn.kernels.lsh.places import sort_buckets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def setting(
    rule,
    tokens,
    queries=None,
    heads=(4, 2),
    batch=2,
    dim=8,
    pads=None,
    causal=True,
    dtype=torch.float64,
    seed=0,
):
    """q, k, v, the buckets of queries (of all tokens) and of keys, the mask, and the places."""
    draw, queries = torch.Generator().manual_seed(seed), tokens if queries is None else queries
    sizes = (
        (heads[0], queries, dim),
        (heads[1], tokens, dim),
        (heads[1], tokens, dim + 3),
    )
    q, k, v = (
        torch.randn(batch, *size, generator=draw, dtype=torch.float64).to(DEVICE, dtype)
        for size in sizes
    )
    rotations = torch.randn(rule.rounds, dim, rule.buckets // 2, generator=draw).to(DEVICE)
    real = None
    if pads:
        real = torch.ones(batch, tokens, dtype=torch.bool, device=DEVICE)
        real[1, : tokens // 3] = pads != "left"
        real[1, tokens - tokens // 3 :] = pads != "right"
    bucket = lsh.hash_tokens(k, rotations)
    if real is not None:
        bucket = torch.where(real[:, None, None], bucket, rule.buckets)
    mine = bucket[..., tokens - queries :] if rule.shared_qk else lsh.hash_tokens(q, rotations)
    rank, _ = lsh.new_ranks(bucket, rule.buckets)
    code = torch.where(bucket < rule.buckets, rule.code(bucket, rank), lsh.NO_KEY)
    places = lsh.places_of(rule, mine, bucket, code, causal, real)
    return q, k, v, torch.nn.functional.pad(mine, (tokens - queries, 0)), bucket, real, places


def seen_by_loops(rule, mine, keys, causal, real):
    """One head of one row: mine and keys are lists of buckets by round. The docstring of `places`,
    word by word.
    """
    tokens = len(keys[0])
    seen = torch.eye(tokens, dtype=torch.bool)
    for of_q, of_k in zip(mine, keys, strict=True):
        chunk_of, ranks = {}, {}
        for j in range(tokens):
            if real[j]:
                chunk_of[j] = ranks.get(of_k[j], 0) // rule.chunk
                ranks[of_k[j]] = ranks.get(of_k[j], 0) + 1
        for i in range(tokens):
            newest = [j for j in range(i + 1) if real[j] and of_k[j] == of_q[i]]
            own = chunk_of[newest[-1]] if newest else 0
            for j in range(i + 1 if causal else tokens):
                near = (own - 1, own) if causal else (own - 1, own, own + 1)
                if real[j] and of_k[j] == of_q[i] and chunk_of[j] in near:
                    seen[i, j] = True
    there = torch.tensor(real)
    return seen & there & there[:, None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pads", [None, "left", "right"])
def test_the_reference_follows_the_definition(causal, pads):
    rule = lsh.Rule(2, 4, 2)
    *_, mine, bucket, real, _ = setting(rule, 31, pads=pads, heads=(2, 1))
    seen = reference.visible(rule, mine, bucket, causal, real)
    for row in range(2):
        there = [True] * 31 if real is None else real[row].tolist()
        for head in range(2):
            expected = seen_by_loops(
                rule, mine[row, head].tolist(), bucket[row, 0].tolist(), causal, there
            )
            assert torch.equal(seen[row, head].cpu(), expected)


RULES = (
    lsh.Rule(3, 4, 2),
    lsh.Rule(2, 2, 1),
    lsh.Rule(4, 8, 5),
    lsh.Rule(4, 4, 64),
    lsh.Rule(3, 4, 2, shared_qk=True),
)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pads", [None, "left", "right"])
def test_torch_is_the_reference(rule, causal, pads):
    """Output and gradients, also of fewer queries than keys."""
    for tokens, queries in (
        (1, 1),
        (2, 2),
        (37, 37),
        (101, 101),
        (50, 13),
    )[: 5 if causal else 4]:
        heads = (2, 2) if rule.shared_qk else (4, 2)
        *given, mine, bucket, real, places = setting(
            rule, tokens, queries, heads, pads=pads, causal=causal
        )
        given = [x.requires_grad_() for x in given]
        got = lsh.attention(*given, places, impl="torch")
        expected = reference.attention(
            *given, rule, mine, bucket, causal=causal, scale=given[0].shape[3] ** -0.5, real=real
        )
        torch.testing.assert_close(got, expected)
        loss = torch.randn_like(got)
        gradients = (torch.autograd.grad((x * loss).sum(), given) for x in (got, expected))
        for ours, truth in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, truth)


def test_a_key_of_several_rounds_counts_once():
    """All rounds with the same rotation: the result is that of one."""
    rule = lsh.Rule(1, 4, 3)
    q, k, v, mine, bucket, _, places = setting(rule, 50)
    once = lsh.attention(q, k, v, places, impl="torch")
    more = lsh.Rule(5, 4, 3)
    mine, bucket = (x.repeat(1, 1, 5, 1) for x in (mine, bucket))
    places = lsh.places_of(more, mine, bucket, more.code(bucket, lsh.new_ranks(bucket, 4)[0]), True)
    torch.testing.assert_close(lsh.attention(q, k, v, places, impl="torch"), once)


@pytest.mark.parametrize("tokens", [1, 40])
def test_buckets_that_are_not_filled_evenly(tokens):
    """All keys in one bucket, all queries in another, or both in one: nothing is quadratic, nothing
    is lost.
    """
    rule = lsh.Rule(1, 4, 4)
    q, k, v, mine, bucket, real, _ = setting(rule, tokens)
    for of_q, of_k in ((0, 0), (1, 3), (3, 1)):
        mine, bucket = torch.full_like(mine, of_q), torch.full_like(bucket, of_k)
        places = lsh.places_of(
            rule, mine, bucket, rule.code(bucket, lsh.new_ranks(bucket, 4)[0]), True
        )
        expected = reference.attention(
            q, k, v, rule, mine, bucket, causal=True, scale=0.3, real=real
        )
        torch.testing.assert_close(
            lsh.attention(q, k, v, places, scale=0.3, impl="torch"), expected
        )
        if of_q != of_k:
            torch.testing.assert_close(expected, v.repeat_interleave(2, 1))  # the own key only


def test_sorting():
    bucket = torch.tensor([[2, 0, 3, 0, 2, 3, 3]])
    order, begin = sort_buckets(bucket, 3)
    assert order.tolist() == [[1, 3, 0, 4, 2, 5, 6]]
    assert begin.tolist() == [[0, 2, 2, 4]]
    rank, count = lsh.new_ranks(bucket, 3, torch.tensor([[5, 1, 0]]))
    assert rank[0, [0, 1, 3, 4]].tolist() == [0, 5, 6, 1]
    assert count.tolist() == [[7, 1, 2]]


def test_hashing_is_argmax_and_ignores_autocast():
    x, rotations = torch.randn(2, 3, 50, 16), torch.randn(4, 16, 5)
    turned = torch.einsum("bhtd,rdn->bhrtn", x, rotations)
    expected = torch.cat([turned, -turned], dim=-1).argmax(dim=-1)
    assert torch.equal(lsh.hash_tokens(x, rotations), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lsh.hash_tokens(x, rotations), expected)
    assert lsh.hash_tokens(torch.zeros(1, 1, 3, 16), rotations).eq(0).all()


def test_a_rows_last_bits_do_not_depend_on_the_others():
    rule = lsh.Rule(2, 4, 8)
    q, k, v, mine, bucket, _, places = setting(
        rule,
        300,
        dtype=torch.float32,
        heads=(4, 4),
    )
    whole = lsh.attention(q, k, v, places, impl="torch")
    for h in range(4):
        one = slice(h, h + 1)
        alone = lsh.places_of(rule, mine[:, one], bucket[:, one], places.code[:, one], True)
        assert torch.equal(
            lsh.attention(q[:, one], k[:, one], v[:, one], alone, impl="torch"), whole[:, one]
        )


# Triton: in its interpreter where there is no GPU.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_triton_is_the_reference(dtype, causal):
    pytest.importorskip("triton")
    for rule, tokens, queries, pads in (
        (lsh.Rule(2, 4, 4), 45, 45, "left"),
        (lsh.Rule(2, 2, 40, True), 40, 40, None),
        (lsh.Rule(3, 2, 2), 50, 17, "right"),
    )[: 3 if causal else 2]:
        heads = (1, 1) if rule.shared_qk else (2, 1)
        *given, mine, bucket, real, places = setting(
            rule, tokens, queries, heads, dim=20, pads=pads, causal=causal, dtype=dtype
        )
        given = [x.requires_grad_() for x in given]
        wide = [x.detach().double().requires_grad_() for x in given]
        got = lsh.attention(*given, places, impl="triton")
        expected = reference.attention(
            *wide, rule, mine, bucket, causal=causal, scale=given[0].shape[3] ** -0.5, real=real
        )
        loss = torch.randn_like(expected)
        ours = [got, *torch.autograd.grad((got.double() * loss).sum(), given)]
        truth = [expected, *torch.autograd.grad((expected * loss).sum(), wide)]
        budget = 1e-5 if dtype == torch.float32 else 1e-2
        for x, y in zip(ours, truth, strict=True):
            assert relative(x, y) < budget


def test_triton_refuses_what_it_does_not_have():
    pytest.importorskip("triton")
    q, k, v, *_, places = setting(lsh.Rule(1, 2, 2), 5)
    with pytest.raises(ValueError, match="float64, valid for impl='triton'"):
        lsh.attention(q, k, v, places, impl="triton")
    with pytest.raises(ValueError, match="head size: got 300"):
        lsh.attention(
            *(x.float().repeat(1, 1, 1, 50)[..., :300] for x in (q, k, v)), places, impl="triton"
        )
