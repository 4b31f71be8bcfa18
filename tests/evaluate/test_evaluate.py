"""Perplexity scores every token once, whatever the windows; KL and the comparison are the plain
formulas.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import effattn
from effattn.evaluate import logits
from effattn.evaluate.loss import _windows, compare, kl_chunked, token_losses


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(2, 300),
    context=st.integers(1, 64),
    data=st.data(),
)
def test_every_prediction_counts_exactly_once(n, context, data):
    stride = data.draw(st.integers(1, context))
    seen = []
    for starts, width, first in _windows(n, context, stride, batch_tokens=128):
        assert 1 <= width <= context
        for start in starts:
            seen += range(start + first, start + width)
            if start:
                assert first >= context - stride or start + width == n - 1
    assert sorted(seen) == list(range(n - 1))


def test_one_window_is_the_plain_cross_entropy(tokens):
    model, ids = tiny("llama"), tokens[:65]
    logits = model(input_ids=ids[None, :-1]).logits[0]
    expected = F.cross_entropy(logits.float(), ids[1:], reduction="none")
    torch.testing.assert_close(token_losses(model, ids, 64), expected.detach())
    assert effattn.perplexity(model, ids, 64) == pytest.approx(math.exp(expected.mean().item()))


def test_stride_gives_context(tokens):
    """With a stride of one, every loss is that of the last position of its own full window."""
    model, ids = tiny("llama"), tokens[:40]
    found = token_losses(model, ids, 16, 1)
    for position in (0, 5, 15, 20, 38):
        window = ids[max(0, position - 15) : position + 2]
        logits = model(input_ids=window[None, :-1]).logits[0, -1]
        assert found[position].item() == pytest.approx(
            F.cross_entropy(logits[None], window[-1:]).item(), abs=1e-5
        )


def test_perplexity_keeps_the_mode_and_refuses_nonsense(tokens):
    model = tiny("llama").train()
    effattn.perplexity(model, tokens[:64], 32)
    assert model.training
    for arguments, message in (
        ((tokens.float(), 32), "int64"),
        ((tokens[:1], 32), "at least 2"),
        ((tokens, 0), "context: got 0"),
        ((tokens, 32, 33), "stride: got 33, valid is 1 to context"),
        ((tokens + 90, 32), "vocabulary is 0 to 95"),
    ):
        with pytest.raises(ValueError, match=message):
            effattn.perplexity(model, *arguments)


def test_compare_is_the_plain_kl(tokens):
    teacher, student, ids = tiny("llama", seed=1), tiny("llama", seed=2), tokens[:129]
    result = compare(teacher, student, ids, 64)
    rows = torch.stack([ids[:64], ids[64:128]])
    t, s = (m(input_ids=rows).logits.log_softmax(-1) for m in (teacher, student))
    assert result["kl"] == pytest.approx((t.exp() * (t - s)).sum(-1).mean().item(), rel=1e-5)
    assert result["cross_entropy"] == pytest.approx(
        token_losses(student, ids, 64).mean().item(), rel=1e-5
    )
    assert compare(teacher, teacher, ids, 64)["kl"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "gpt_neox", "opt"])
def test_pieces_of_logits_give_the_same_losses(kind, tokens, monkeypatch):
    """A soft cap, a scale and a bias of the head are in every piece; no piece is larger than
    asked.
    """
    teacher, student, ids = tiny(kind, seed=1), tiny(kind, seed=2), tokens[:129]
    whole = token_losses(student, ids, 64, 40), compare(teacher, student, ids, 64)
    largest = []
    monkeypatch.setattr(logits, "BYTES", 20 * 4 * 96)  # 20 positions
    keep = logits.Scores.logits
    monkeypatch.setattr(
        logits.Scores, "logits", lambda *a: largest.append((x := keep(*a)).numel() * 4) or x
    )
    pieces = token_losses(student, ids, 64, 40), compare(teacher, student, ids, 64)
    torch.testing.assert_close(pieces[0], whole[0], rtol=1e-5, atol=1e-5)
    assert pieces[1] == pytest.approx(whole[1], rel=1e-5)
    assert max(largest) <= logits.BYTES


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 999),
)
def test_chunks_do_not_change_the_kl(rows, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, rows, 11, generator=generator)
    expected = F.kl_div(
        b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(kl_chunked(a, b, chunk), expected)
    assert (kl_chunked(a, b, chunk) >= -1e-5).all()
