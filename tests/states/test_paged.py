"""A cache in pages: the bits of a full one, in the bytes of what differs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import tiny

from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.measuring.measurement import measure
from effattn.registry import backend
from effattn.states.caches import parse
from effattn.states.paged import PagedState
from effattn.surgery.checkpoint import load, save
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active, restore, swap

H, HKV, D = 4, 2, 16
IDS = torch.randint(3, 96, (2, 37), generator=torch.Generator().manual_seed(0))
PAGE_BYTES = HKV * 2 * D * 4  # of a token, in fp32


def qkv(rows: int, tokens: int, dtype=torch.float32):
    return [torch.randn(rows, heads, tokens, D).to(dtype) for heads in (H, HKV, HKV)]


def pair(page: int = 16):
    attn = backend("dense")
    return attn, attn.new_state(), parse(f"paged(page={page})").new_state(attn)


def pages(state: PagedState) -> int:
    """How many different pages the rows have, counted in their tables."""
    return len({page for row in state.table for page in row})


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("page", [1, 7, 16, 64])
def test_the_bits_of_a_full_cache(page, dtype):
    """Prompts, chunks, steps, beams, crop: whatever is done to both."""
    torch.manual_seed(0)
    attn, full, paged = pair(page)
    rows = 3
    moves = [
        *(33, 1, 1, lambda s: s.reorder(torch.tensor([2, 0, 0])), 1, 20, 1),
        *(lambda s: s.crop(40), 1, 1, lambda s: s.repeat(2), 1, 17),
        *(lambda s: s.select(torch.tensor([5, 1])), 1, lambda s: s.reset(), 5, 40, 1),
    ]
    for move in moves:
        if callable(move):
            move(full)
            move(paged)
            rows = full.batch or rows
            continue
        new = qkv(rows, move, dtype)
        assert torch.equal(attn(*new, state=full), attn(*new, state=paged))
        assert paged.seq_len == full.seq_len
        assert paged.pool.used == pages(paged)
        assert sorted(paged.pool.free + sorted({p for row in paged.table for p in row})) == [
            *range(len(paged.pool.users))
        ]


@torch.no_grad()
def test_bytes_are_the_prompt_and_what_differs():
    """repeat(8), and steps that differ: eight tails, one prompt; writing copies a page."""
    attn, _, state = pair()
    attn(*qkv(1, 100), state=state)
    assert state.nbytes == 7 * 16 * PAGE_BYTES == state.predicted_bytes(100, 1, HKV, D, 4)
    state.repeat(8)
    assert pages(state) == 7
    assert state.nbytes == 7 * 16 * PAGE_BYTES
    for _ in range(20):  # tokens 100 to 119: the seventh page of each, and an eighth
        attn(*qkv(8, 1), state=state)
    assert pages(state) == 6 + 8 * 2
    assert state.nbytes == (6 + 8 * 2) * 16 * PAGE_BYTES
    held = sum(x.untyped_storage().nbytes() for x in state.tensors())
    assert held <= state.nbytes * 1.2 + 8 * 16 * PAGE_BYTES  # room to grow is bounded
    state.reorder(torch.zeros(8, dtype=torch.int64))  # all beams come from one
    assert state.nbytes == 8 * 16 * PAGE_BYTES
    state.select(torch.tensor([0]))
    state.crop(96)
    assert state.nbytes == 6 * 16 * PAGE_BYTES
    state.reset()
    assert state.nbytes == 0


@torch.no_grad()
def test_prompts_that_come_many_times_are_held_once():
    """As `generate` hands them over for beams: pages that the row before has too are shared."""
    attn, _, state = pair(page=8)
    q, k, v = qkv(1, 30)
    k, v = k.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1)
    k[2, :, 17:] += 1  # a question of its own behind the same beginning
    attn(q.repeat(3, 1, 1, 1), k, v, state=state)
    assert pages(state) == 4 + 2
    copied = copy.deepcopy(state)
    new = qkv(3, 1)
    expected = attn(new[0], torch.cat([k, new[1]], 2), torch.cat([v, new[2]], 2))
    assert torch.allclose(attn(*new, state=state), expected, atol=1e-6)
    assert torch.allclose(attn(*new, state=copied), expected, atol=1e-6)


def model_of(**changes):
    return tiny("llama", dtype=torch.float32, num_key_value_heads=2, **changes)


def generate(model, **options):
    torch.manual_seed(0)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    return model.generate(
        IDS,
        attention_mask=mask,
        max_new_tokens=20,
        pad_token_id=0,
        eos_token_id=None,
        **{"do_sample": False} | options,
    )


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 4},
        {"prefill_chunk_size": 16},
    ],
)
def test_generate(way):
    model = model_of()
    expected = generate(model, **way)
    swap(model, cache="paged(page=8)")
    cache = new_cache(model)
    assert torch.equal(generate(model, past_key_values=cache, **way), expected)
    state = cache.layers[0].state
    rows = len(state.table)
    if rows > 2:  # three beams or four samples of each prompt, which has five pages
        assert pages(state) < rows * len(state.table[0]) - (rows - 2)


@torch.no_grad()
def test_in_a_model(tmp_path):
    model, plain = model_of(), model_of()
    swap(model, cache={"0": "paged(page=4)"})
    told = describe(model).layers
    assert [layer["cache"] for layer in told] == ["paged(page=4)", "full"]
    assert told[0]["kv_bytes_per_token"] == told[1]["kv_bytes_per_token"]
    save(model, tmp_path / "out")
    assert active(load(tmp_path / "out")).caches[0] == "paged(page=4)"
    assert torch.equal(load(tmp_path / "out")(IDS).logits, plain(IDS).logits)
    with pytest.raises(Unsupported, match=r"paged.*sliding remembers is"):
        swap(model, "sliding(window=8)", cache="paged")
    swap(model, positions="rerope(window=16)", cache="paged")  # raw keys, turned as they are read
    swap(plain, "dense", positions="rerope(window=16)")
    assert torch.equal(generate(model), generate(plain))
    restore(model)
    restore(plain)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.slow
def test_measure_counts_it():
    """Pages that are begun count whole."""
    how = {"contexts": (40,), "batches": (2,), "steps": 2, "seconds": 0.05}
    model = model_of()
    told = measure(model, {"paged": "cache=paged(page=16)"}, **how).to_json()
    plain, paged = (row["kv_bytes_held"] for row in json.loads(told)["rows"])
    assert paged == plain * 48 // 40


def test_gradients_are_refused():
    attn, _, state = pair()
    q, k, v = (x.requires_grad_() for x in qkv(1, 5))
    with pytest.raises(Unsupported, match=r"no gradients; valid are torch.no_grad"):
        attn(q, k, v, state=state)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("paged(page=0)", "page: got 0, valid is a whole number of 1 to 65536"),
        ("paged(page=True)", "page: got True"),
        ("paged(page=16.0)", "page: got 16.0"),
        ("paged(pag=16)", "got 'pag'.*did you mean 'page'"),
        ("pagd", "did you mean 'paged'"),
    ],
)
def test_bad_specs(spec, said):
    with pytest.raises(ValueError, match=said):
        parse(spec)
