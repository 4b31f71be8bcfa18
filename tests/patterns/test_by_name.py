"""Methods that people know by a name that is no spec here (docs/methods.md), held to their papers'
formulas, pair by pair in fp64."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import effattn
from effattn import positions
from effattn.conformance import inputs
from effattn.projections import LowRankLinear
from effattn.specs import parse_spec

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
T, SIZE = 29, 8
I, J = torch.arange(T)[:, None], torch.arange(T)


def softmax_over(scores, seen, v):
    """(B, H, T, D) of scores (B, H, T, T) where `seen`."""
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ v


def nearest(scores, allowed, count):
    """Which of the `allowed` keys are among the `count` best of each query."""
    ranked = scores.masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True)
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked[..., :count], True)
    return best & allowed


def test_blockwise_causal_attention():
    """BCA (arXiv:2212.10554, section 3.3): blocks of half the trained length, a query sees its own
    and the one before, under xPOS: Re(sum_f q_f conj(k_f) e^(i theta_f D) zeta_f^(D/512))."""
    q, k, v = inputs(T, torch.float64, sizes=(1, 2, 2, SIZE))
    rule = positions.rule("xpos", length=12, head_dim=SIZE, heads=2)
    attn = effattn.backend("block(block=6, look_back=1)")
    pair = torch.arange(0, SIZE, 2, dtype=torch.float64)
    theta = 10000.0 ** (-pair / SIZE)
    zeta = (pair + 0.4 * SIZE) / (1.4 * SIZE)
    distance = (I - J).double()[..., None]
    turn = torch.polar(zeta ** (distance / 512), theta * distance)
    a, b = (torch.complex(*x.chunk(2, dim=-1)) for x in (q, k))
    scores = (a[:, :, :, None] * b.conj()[:, :, None] * turn).sum(-1).real * SIZE**-0.5
    seen = (J <= I) & (I // 6 - J // 6 <= 1)
    found = attn(q, k, v, rotary=rule)
    torch.testing.assert_close(found, softmax_over(scores, seen, v), rtol=1e-6, atol=1e-6)


def test_memorizing_transformers_and_focused_attention():
    """Exact kNN (arXiv:2203.08913, section 3.2; arXiv:2307.03170): the local context, and the best
    keys before it; FoT's one softmax over both."""
    q, k, v = inputs(T, torch.float64, sizes=(2, 3, 3, SIZE))
    scores = q @ k.mT * SIZE**-0.5
    local = (J <= I) & (I - J < 6)
    seen = local | nearest(scores, (J <= I) & ~local, 3)
    found = effattn.backend("topk(window=6, block=1, blocks=3)")(q, k, v)
    torch.testing.assert_close(found, softmax_over(scores, seen, v))


def test_unlimiformer():
    """arXiv:2305.01625, section 2.2: of all that was read a query attends to its k best keys."""
    q, k, v = inputs(T, torch.float64, sizes=(1, 2, 2, SIZE))
    scores = q @ k.mT * SIZE**-0.5
    own = I == J  # a decoder's query has its own key, too
    seen = own | nearest(scores, I > J, 4)
    found = effattn.backend("topk(window=1, block=1, blocks=4)")(q, k, v)
    torch.testing.assert_close(found, softmax_over(scores, seen, v))


def test_landmark_attention_at_inference():
    """arXiv:2305.16300, section 3.2: blocks by the score of one vector each, then all of their
    tokens. Its landmark is trained; a mean stands in its place."""
    q, k, v = inputs(T, torch.float64, sizes=(1, 2, 2, SIZE))
    size, blocks = 4, T // 4
    landmarks = k[:, :, : blocks * size].unflatten(2, (blocks, size)).mean(dim=3)
    first = torch.arange(blocks) * size
    finished = first + size - 1 <= I
    near = (I - first < size) & (first <= I)  # all of it is in the window
    best = nearest(q @ landmarks.mT, (finished & ~near).expand(1, 2, T, blocks), 2)
    chosen = best.repeat_interleave(size, dim=-1)
    chosen = torch.nn.functional.pad(chosen, (0, T - blocks * size))
    seen = chosen | ((J <= I) & (size > I - J))
    found = effattn.backend(f"topk(window={size}, block={size}, blocks=2)")(q, k, v)
    torch.testing.assert_close(found, softmax_over(q @ k.mT * SIZE**-0.5, seen, v))


def test_transient_global_tokens():
    """LongT5 (arXiv:2112.07916, section 3.1): a global token a block, made of the block's tokens.
    Here the mean of its keys and values, which counts as the tokens that it stands for."""
    q, k, v = inputs(T, torch.float64, sizes=(1, 2, 2, SIZE))
    size, blocks = 4, T // 4
    k_mean, v_mean = (
        x[:, :, : blocks * size].unflatten(2, (blocks, size)).mean(dim=3) for x in (k, v)
    )
    both_k, both_v = torch.cat([k, k_mean], dim=2), torch.cat([v, v_mean], dim=2)
    scores = q @ both_k.mT * SIZE**-0.5
    scores[..., T:] += math.log(size)
    own = (J <= I) & (I // size == J // size)
    seen = torch.cat([own, torch.arange(blocks) < I // size], dim=-1)
    spec = f"linformer_blockwise(k=8, max_length={8 * size}, block={size}, init='pool')"
    found = effattn.backend(spec)(q, k, v)
    torch.testing.assert_close(found, softmax_over(scores, seen, both_v), rtol=1e-6, atol=1e-6)


def test_transient_global_tokens_of_an_encoder():
    """LongT5 (arXiv:2112.07916, section 3.1): a query sees its neighbours, and a global token for
    each block of all that there is, in one softmax."""
    tokens, size, radius = 32, 4, 3
    q, k, v = inputs(tokens, torch.float64, sizes=(1, 2, 2, SIZE))
    k_mean, v_mean = (x.unflatten(2, (tokens // size, size)).mean(dim=3) for x in (k, v))
    both_k, both_v = torch.cat([k, k_mean], dim=2), torch.cat([v, v_mean], dim=2)
    scores = q @ both_k.mT * SIZE**-0.5
    scores[..., tokens:] += math.log(size)
    at = torch.arange(tokens)
    near = (at[:, None] - at).abs() <= radius
    seen = torch.cat([near, torch.ones(tokens, tokens // size, dtype=torch.bool)], dim=-1)
    spec = f"linformer(k={tokens // size}, max_length={tokens}, window={2 * radius + 1})"
    found = effattn.backend(spec)(q, k, v, causal=False)
    torch.testing.assert_close(found, softmax_over(scores, seen, both_v), rtol=1e-6, atol=1e-6)


def test_svd():
    """The closest matrix of a rank (Eckart and Young): the first singular vectors and values."""
    draw = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(24, 16, bias=False, dtype=torch.float64)
    linear.weight.data.normal_(generator=draw)
    u, s, vh = torch.linalg.svd(linear.weight.detach())
    best = (u[:, :5] * s[:5]) @ vh[:5]
    found = LowRankLinear.from_linear(linear, rank=5).to_linear().weight
    torch.testing.assert_close(found, best)


SPEC = re.compile(r"`((?:topk|block|sliding|linformer|linformer_blockwise|lowrank)\([^`]*\))`")


@pytest.mark.parametrize("spec", sorted(set(SPEC.findall(PAGE.read_text(encoding="utf-8")))))
def test_specs_of_the_page_are_valid(spec):
    name, options = parse_spec(spec)
    if name == LowRankLinear.name:
        assert LowRankLinear.options(**options)["method"] == "svd"
    else:
        effattn.backend(spec)
