"""kernels/ragged: heads of any number of keys, both implementations against the definition."""

from __future__ import annotations

import pytest
import torch

from effattn.kernels import ragged
from effattn.kernels.merge import merge
from effattn.kernels.pack import Coding
from effattn.kernels.ragged import Ragged, torch_impl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, VALUE = 32, 16


def kept_of(counts, dtype=torch.float64, codings=(None, None), tokens=40) -> Ragged:
    """Rows of heads with so many keys each, of random places."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.tensor(counts)
    batch, heads = counts.shape
    k, v = (torch.randn(batch, heads, tokens, d, generator=draw) for d in (DIM, VALUE))
    rank = torch.rand(batch, heads, tokens, generator=draw).argsort(dim=2).argsort(dim=2)
    stays = (rank < counts[..., None]).to(DEVICE)
    stored = (ragged.encode(x.to(DEVICE, dtype), c) for x, c in zip((k, v), codings, strict=True))
    return Ragged.of_mask(*stored, stays, (DIM, VALUE), dtype, codings)


def q_of(batch, heads, queries, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(batch, queries, heads, DIM, generator=draw).to(DEVICE, dtype)
    return q.transpose(1, 2)  # as a projection gives them


CASES = {
    "uneven": [[5, 40, 1], [0, 17, 33]],
    "alike": [[9, 9, 9], [9, 9, 9]],
    "nothing": [[0, 0, 0], [0, 0, 0]],
    "one row": [[40, 3, 39]],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("queries", [1, 5, 300])
def test_torch(case, queries, monkeypatch):
    monkeypatch.setattr(torch_impl, "MOST", 64)
    kept = kept_of(CASES[case])
    q = q_of(len(kept.rows), 6, queries)
    for softcap in (None, 3.0):
        how = dict(scale=0.2, softcap=softcap)
        found, want = (ragged.attention(q, kept, **how, impl=i) for i in ("torch", "reference"))
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_triton(case, dtype):
    kept = kept_of(CASES[case], dtype)
    for queries, softcap in ((1, None), (7, 3.0)):
        q = q_of(len(kept.rows), 6, queries, dtype)
        how = dict(scale=0.2, softcap=softcap)
        out, lse = ragged.attention(q, kept, **how, impl="triton")
        want, sums = ragged.attention(q.double(), kept, **how, impl="reference")
        plain, _ = ragged.attention(q, kept, **how, impl="torch")
        budget = 2 * (plain.double() - want).norm() + 1e-6 * want.norm()
        assert (out.double() - want).norm() <= budget
        torch.testing.assert_close(lse, sums.float(), rtol=1e-3, atol=1e-3)


def test_triton_in_splits(monkeypatch):
    """A long head beside a short one: parts that have no keys give nothing."""
    from effattn.kernels.ragged import triton_impl

    monkeypatch.setattr(triton_impl, "split", lambda tiles, *_: tiles)
    kept = kept_of([[300, 2, 0]], torch.float32, tokens=300)
    q = q_of(1, 6, 1, torch.float32)
    found, want = (ragged.attention(q, kept, scale=0.2, impl=i) for i in ("triton", "reference"))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_rows_are_shared_and_selected(impl):
    kept = kept_of(CASES["uneven"])
    assert kept.repeat(3).nbytes == kept.nbytes + 4 * 8
    q = q_of(4, 6, 2)
    whole = [ragged.attention(q[[i, i]], kept, scale=0.2, impl=impl) for i in range(4)]
    for index in ([1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]):
        some = kept.select(torch.tensor(index))
        found = ragged.attention(q, some, scale=0.2, impl=impl)
        for row, own in enumerate(index):
            for x, y in zip(found, whole[row], strict=True):
                torch.testing.assert_close(x[row], y[own])
        assert some.stored == len(set(index))
        again = some.repeat(2).select(torch.tensor([6]))
        assert again.lengths == kept.lengths[3 * index[3] : 3 * index[3] + 3]
    k, v, there = kept.padded()
    assert there.sum(dim=2).flatten().tolist() == list(kept.lengths)
    assert torch.equal(k[there], kept.k)
    assert torch.equal(v[there], kept.v)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_tokens(kind):
    coding = Coding(kind, "token", 16, symmetric=kind == "int8")
    kept = kept_of(CASES["uneven"], torch.float32, (coding, coding))
    full = kept_of(CASES["uneven"], torch.float32)
    assert kept.k.dtype == torch.uint8
    assert kept.k.nbytes < full.k.nbytes / (3 if kind == "int8" else 5)
    q = q_of(2, 6, 1, torch.float32)
    found, want = (ragged.attention(q, x, scale=0.2)[0] for x in (kept, full))
    step = 0.03 if kind == "int8" else 0.3
    assert 0 < (found - want).abs().max() < step
    torch.testing.assert_close(ragged.attention(q, kept.unpacked(), scale=0.2)[0], found)


def test_both_parts_are_attention_to_all():
    """Merged with what came since, it is softmax over the union."""
    kept, q = kept_of([[40, 40]], tokens=40), q_of(1, 4, 1)
    k, v, _ = kept.padded()
    halves = [
        Ragged.of_mask(k, v, at.expand(1, 2, 40), (DIM, VALUE), k.dtype)
        for at in (torch.arange(40) < 13, torch.arange(40) >= 13)
    ]
    found = merge([ragged.attention(q, one, scale=0.2) for one in halves])
    torch.testing.assert_close(found, ragged.attention(q, kept, scale=0.2))


def test_sizes_that_do_not_fit():
    kept = kept_of(CASES["uneven"])
    for q in (q_of(3, 6, 1), q_of(2, 4, 1), q_of(2, 6, 1)[..., :8]):
        with pytest.raises(ValueError, match="valid are 2 rows, a multiple of 3 heads, and 32"):
            ragged.attention(q, kept, scale=1.0)
