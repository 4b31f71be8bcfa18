"""kernels/topk: the choice against a loop, both implementations against the reference, and what
learned summaries learn."""

from __future__ import annotations

import pytest
import torch

from effattn.conformance import inputs, relative
from effattn.kernels import topk
from effattn.kernels.topk import reference, selection, torch_impl
from effattn.kernels.topk.learning import pool_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = (
    topk.Rule(window=5, sinks=2, block=4, blocks=3),
    topk.Rule(window=1, block=1, blocks=4, summary="minmax"),
    topk.Rule(window=9, sinks=11, block=7, blocks=2),
    topk.Rule(window=3, block=16, blocks=1, summary="minmax"),
    topk.Rule(window=4, sinks=1, block=3, blocks=3, summary="spread"),
)


def far_by_reference(
    rule,
    q,
    k,
    v,
    chosen,
    at,
    scale,
):
    """What `topk.attention` is to give, in fp64, pair by pair."""
    group = q.shape[1] // k.shape[1]
    j = torch.arange(k.shape[2], device=q.device)
    block = j // rule.block
    seen = (chosen[..., None] == block).any(dim=3)
    here = at[:, None, :, None]
    seen = seen & (here - j >= rule.window) & (j >= rule.sinks)
    seen = seen.repeat_interleave(group, dim=1)
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q.double() @ keys.mT * scale).masked_fill(~seen, -torch.inf)
    weights = torch.softmax(scores, dim=3).nan_to_num(0.0)
    return weights @ values, scores.logsumexp(dim=3)


def setting(
    rule,
    tokens,
    queries,
    dtype=torch.float64,
    pads=False,
    heads=(4, 2),
):
    q, k, v = inputs(tokens, dtype, DEVICE, sizes=(2, *heads, 16))
    q, v = q[:, :, tokens - queries :], v[..., :12]
    at = torch.arange(tokens - queries, tokens, device=DEVICE).repeat(2, 1)
    if pads:
        at[1] -= 9
    chosen = topk.select(rule, q, topk.summarise(rule, k), at)
    return q, k, v, chosen, at


@pytest.mark.parametrize("rule", RULES)
def test_a_query_reads_the_best_of_its_candidates(rule):
    q, k, _, chosen, at = setting(rule, 41, 41, pads=True)
    summaries, probes = topk.summarise(rule, k), topk.probes(rule, q, 2)
    for row, head, query in (
        (0, 0, 40),
        (1, 1, 40),
        (0, 1, 23),
        (1, 0, 11),
        (0, 0, 3),
    ):
        here = int(at[row, query])
        far = [
            n
            for n in range((here + 1) // rule.block)
            if any(
                here - j >= rule.window and j >= rule.sinks
                for j in range(n * rule.block, (n + 1) * rule.block)
            )
        ]
        scores = {n: float(summaries[row, head, n] @ probes[row, head, query]) for n in far}
        best = sorted(scores, key=scores.get)[-rule.blocks :]
        got = [n for n in chosen[row, head, query].tolist() if n >= 0]
        assert sorted(got) == sorted(best)


def test_minmax_bounds_every_key_of_its_block():
    rule = topk.Rule(window=1, block=8, summary="minmax")
    q, k, _ = inputs(64, torch.float64, sizes=(2, 2, 2, 16))
    bound = topk.probes(rule, q, 2) @ topk.summarise(rule, k).mT
    assert (bound[..., None] >= (q @ k.mT).unflatten(3, (8, 8)) - 1e-12).all()


def test_spread_is_the_mean_and_half_of_what_the_furthest_keys_could_add():
    q, k, _ = inputs(64, torch.float64, sizes=(2, 4, 2, 16))
    rule = topk.Rule(window=1, block=8, summary="spread")
    got = topk.probes(rule, q, 2) @ topk.summarise(rule, k).mT
    keys, group = k.unflatten(2, (8, 8)), q.unflatten(1, (2, 2))
    mean = group @ keys.mean(dim=3)[:, :, None].mT
    half = (keys.amax(dim=3) - keys.amin(dim=3)) / 2
    most = (group[..., None, :].abs() * half[:, :, None, None]).sum(dim=-1)
    torch.testing.assert_close(got, (mean + most / 2).sum(dim=2))


def test_the_choice_is_the_same_in_parts(monkeypatch):
    rule = RULES[0]
    q, k, _, chosen, at = setting(rule, 60, 60)
    monkeypatch.setitem(selection.SCORES, DEVICE, 500)
    again = topk.select(rule, q, topk.summarise(rule, k), at)
    assert torch.equal(again.sort(dim=3).values, chosen.sort(dim=3).values)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("queries", "pads"), [(41, True), (13, False)])
def test_torch_is_the_reference(rule, queries, pads):
    q, k, v, chosen, at = setting(rule, 41, queries, pads=pads)
    _same(
        rule,
        q,
        k,
        v,
        chosen,
        at,
        "torch",
        1e-12,
    )


@pytest.mark.parametrize(("rule", "heads"), [(0, (4, 2)), (2, (2, 1)), (3, (2, 2))])
def test_triton_is_the_reference(rule, heads):
    rule = RULES[rule]
    q, k, v, chosen, at = setting(
        rule,
        41,
        9,
        torch.float32,
        pads=True,
        heads=heads,
    )
    _same(
        rule,
        q,
        k,
        v,
        chosen,
        at,
        "triton",
        1e-5,
    )


def _same(
    rule,
    q,
    k,
    v,
    chosen,
    at,
    impl,
    budget,
):
    found = []
    for run in (topk.attention, far_by_reference):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        options = {"impl": impl} if run is topk.attention else {}
        given = (rule, *leaves) if run is far_by_reference else (*leaves, rule)
        out, lse = run(
            *given,
            chosen,
            at,
            scale=0.3,
            **options,
        )
        some = lse.isfinite()
        draw = torch.Generator().manual_seed(1)
        weight = torch.randn(lse.shape, generator=draw).to(lse)
        loss = (out.double() * weight[..., None]).sum() + (lse[some] * weight[some]).sum()
        found.append((out, torch.where(some, lse, 0.0), *torch.autograd.grad(loss, leaves)))
        assert not out[~some].any()
    for name, ours, truth in zip(
        (
            "out",
            "lse",
            "dq",
            "dk",
            "dv",
        ),
        *found,
        strict=True,
    ):
        assert relative(ours, truth) < budget, name


def test_tiles_and_parts_of_any_size_give_the_same(monkeypatch):
    rule = topk.Rule(window=5, block=2, blocks=5)
    q, k, v, chosen, at = setting(rule, 90, 90)
    expected, _ = topk.attention(
        q,
        k,
        v,
        rule,
        chosen,
        at,
        impl="torch",
    )
    for name, value in (("PAIRS", 700), ("WORK", 900), ("QUERIES", 3)):
        monkeypatch.setattr(torch_impl, name, value)
        got, _ = topk.attention(
            q,
            k,
            v,
            rule,
            chosen,
            at,
            impl="torch",
        )
        torch.testing.assert_close(got, expected)


def test_scores_far_from_zero_stay_finite():
    rule = topk.Rule(window=2, block=2, blocks=3)
    q, k, v, chosen, at = setting(rule, 40, 40, torch.float32)
    out, lse = topk.attention(
        q * 1e3,
        k,
        v,
        rule,
        chosen,
        at,
        impl="torch",
    )
    assert out.isfinite().all()
    assert lse[:, :, 4:].isfinite().all()


def test_the_definition_sees_each_key_once_and_no_block_that_is_not_finished():
    rule = topk.Rule(window=2, sinks=1, block=4, blocks=9)
    q, k, _ = inputs(14, torch.float64, sizes=(1, 2, 1, 8))
    seen = reference.visible(rule, q, k, torch.ones(1, 14, dtype=torch.bool))
    for i in range(14):
        whole = set(range((i + 1) // 4 * 4)) | {0, i, max(0, i - 1)}
        assert set(seen[0, 0, i].nonzero()[:, 0].tolist()) == whole


def test_a_learned_summary_learns_where_attention_is():
    """One key in each block matters, which the mean hides."""
    draw = torch.Generator().manual_seed(0)
    rule = topk.Rule(window=2, block=8, blocks=1, summary="learned")
    q, k, _ = inputs(96, torch.float32, sizes=(1, 2, 1, 16))
    k[..., 0] = 0
    k[:, :, 3::8] = 4 * torch.randn(
        1,
        1,
        12,
        16,
        generator=draw,
    )
    k[:, :, 3::8, 0] = 6.0
    at, pool = torch.arange(96)[None], torch.zeros(1, 16, requires_grad=True)
    optimizer = torch.optim.Adam([pool], lr=0.05)
    losses = []
    for _ in range(60):
        loss = pool_loss(
            q,
            k,
            rule,
            pool,
            at,
            scale=0.25,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert pool[0, 0] > 0
