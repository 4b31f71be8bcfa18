"""Packed caches of topk: against the definition, pair by pair, with the choice of full precision;
what is declared, taken back and refused; in a model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.kernels.pack import pack, unpack
from effattn.kernels.topk import reference
from effattn.positions import rule as rule_of
from effattn.quant.formats import Format
from effattn.quant.packed.blocks import PackedBlocks
from effattn.quant.packed.kind import Packed
from effattn.quant.packed.state import PackedState
from effattn.surgery.describing import describe

H, HKV, D = 4, 2, 32
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES = (
    ("topk(window=20, sinks=3, block=8, blocks=3)", "int8(residual=16, group=32)"),
    ("topk(window=4, block=4, blocks=2, summary='minmax')", "int4(residual=3, group=32)"),
    ("topk(window=9, sinks=1, block=5, blocks=2)", "int2(residual=16, group=32, rotate='kv')"),
    ("topk(window=3, block=1, blocks=4)", "int4(residual=0, k_axis='token', v_axis='channel')"),
)


def state_of(attn, spec: str) -> PackedBlocks:
    return Packed(spec, Format.parse(spec).fit(D)[0]).new_state(attn)


def qkv(tokens: int, draw: torch.Generator, batch: int = 2):
    return [torch.randn(batch, h, tokens, D, generator=draw) for h in (H, HKV, HKV)]


def by_definition(attn, state, q, k, v, low: int):
    """Of the queries from number `low` on: who sees whom by the keys as they came, the scores by
    what is stored before that call. Formats that rotate are held to it by other tests."""
    real = torch.ones(len(k), k.shape[2], dtype=torch.bool)
    seen = reference.visible(attn.rule, q, k, real)[:, :, low:]
    border = state.border(low)
    first = min(state.format.first, border)
    held = []
    for x, coding in ((k, state.format.k), (v, state.format.v)):
        again = unpack(pack(x[:, :, first:border], coding), x.dtype)
        x = torch.cat([x[:, :, :first], again, x[:, :, border:]], dim=2)
        held.append(x.repeat_interleave(H // HKV, dim=1))
    scores = (q[:, :, low:] @ held[0].mT * D**-0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=3) @ held[1]


@torch.no_grad()
@pytest.mark.parametrize(("spec", "cache"), [CASES[0], CASES[1], CASES[3]])
def test_the_choice_is_that_of_full_precision_and_what_is_read_is_packed(spec, cache):
    attn, draw = effattn.backend(spec), torch.Generator().manual_seed(0)
    state, given = state_of(attn, cache), qkv(105, draw)
    low = 0
    for tokens in (70, 1, 17, 1, 16):
        part = [x[:, :, low : low + tokens] for x in given]
        got = attn(*part, state=state)
        want = by_definition(attn, state, *(x[:, :, : low + tokens] for x in given), low)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
        low += tokens
        assert state.nbytes == state.predicted_bytes(low, 2, HKV, D, 4)
    assert state.summaries.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize(("spec", "cache"), CASES)
def test_padding_rows_and_what_is_taken_back(spec, cache):
    """A row behind padding is as it is alone; a guess that is taken back leaves nothing."""
    attn, draw = effattn.backend(spec), torch.Generator().manual_seed(1)
    both, alone = state_of(attn, cache), state_of(attn, cache)
    given, pad, low = qkv(130, draw), 32, 0  # whole groups, so that both are packed alike
    mask = torch.ones(2, 130, dtype=torch.bool)
    mask[1, :pad] = False
    for tokens in (90, 1, 20, 1, 1):
        part = [x[:, :, low : low + tokens] for x in given]
        got = attn(*part, state=both, padding_mask=mask[:, : low + tokens])[1:]
        own = [x[1:, :, max(pad - low, 0) :] for x in part]
        want = attn(*own, state=alone)
        # groups along time begin elsewhere in a row with padding
        assert (got[:, :, max(pad - low, 0) :] - want).norm() < 0.25 * want.norm()
        low += tokens
    assert torch.equal(both.summaries[1, :, : alone.summaries.shape[2]], alone.summaries[0])
    guessed, plain = copy.deepcopy(alone), copy.deepcopy(alone)
    guessed.candidates = 5
    attn(*qkv(6, draw, 1), state=guessed)
    guessed.crop(int(plain.seq_len))
    assert guessed.summaries.shape == plain.summaries.shape
    for tokens in (1, 1, 18, 1):
        new = qkv(tokens, draw, 1)
        torch.testing.assert_close(attn(*new, state=guessed), attn(*new, state=plain))
    guessed.repeat(2)
    guessed.reorder(torch.tensor([1, 0]))
    guessed.select(torch.tensor([1]))
    new = qkv(1, draw, 1)
    torch.testing.assert_close(attn(*new, state=guessed), attn(*new, state=plain))
    with pytest.raises(ValueError, match="packed for good"):
        guessed.crop(40)
    guessed.crop(0)
    assert guessed.nbytes == 0


@torch.no_grad()
@pytest.mark.parametrize("how", ["select", "crop"])
def test_a_row_behind_long_padding_goes_on_where_rows_with_more_blocks_were(how):
    attn, given = effattn.backend(CASES[0][0]), qkv(180, torch.Generator().manual_seed(5))
    mask = torch.ones(2, 180, dtype=torch.bool)
    mask[1 if how == "select" else 0 :, :112] = False

    def states():
        state = state_of(attn, "int8(residual=32, group=32)")
        attn(*(x[:, :, :152] for x in given), state=state, padding_mask=mask[:, :152])
        return state

    changed, plain, low, kept = states(), states(), 152, slice(None)
    if how == "select":
        changed.select(torch.tensor([1]))
        kept = slice(1, 2)
    else:
        changed.crop(150)
        low = 150
        plain = state_of(attn, "int8(residual=32, group=32)")
        attn(*(x[:, :, :low] for x in given), state=plain, padding_mask=mask[:, :low])
    for t in range(low, 180):
        part = [x[:, :, t : t + 1] for x in given]
        want = attn(*part, state=plain, padding_mask=mask[:, : t + 1])[kept]
        got = attn(*(x[kept] for x in part), state=changed, padding_mask=mask[kept, : t + 1])
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_what_is_mixed_before_it_is_packed_changes_no_choice():
    attn, draw = effattn.backend(CASES[0][0]), torch.Generator().manual_seed(2)
    given, outs = qkv(120, draw), []
    for cache in ("int8(residual=16)", "int8(residual=16, rotate='kv')"):
        state = state_of(attn, cache)
        parts = [[x[:, :, low:high] for x in given] for low, high in ((0, 100), (100, 120))]
        outs.append(torch.cat([attn(*part, state=state) for part in parts], dim=2))
    assert (outs[0] - outs[1]).norm() < 0.02 * outs[0].norm()


@torch.no_grad()
def test_it_lives_in_a_model(tmp_path):
    """Greedy, beams, padding and prompt lookup; the checkpoint; what a token takes."""
    model = tiny("llama", dtype=torch.float32, **SIZES)
    ids = torch.randint(3, 60, (2, 60), generator=torch.Generator().manual_seed(0))
    spec = "topk(window=20, sinks=2, block=4, blocks=2)"
    effattn.swap(model, spec)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    full, plain = model.generate(ids, **options), describe(model).layers[0]["kv_bytes_per_token"]
    cache = "int8(residual=16, group=32)"
    effattn.swap(model, spec, cache=cache)
    assert torch.equal(model.generate(ids, **options)[:, :61], full[:, :61])
    heads = model.config.num_key_value_heads
    dim = model.config.hidden_size // model.config.num_attention_heads
    packed = Format.parse(cache).fit(dim)[0].bytes_per_token(heads, dim)
    summary = heads * dim * 4 / 4
    assert plain == 2 * heads * dim * 4 + summary
    assert describe(model).layers[0]["kv_bytes_per_token"] == packed + summary
    model.generate(ids, num_beams=3, **options)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[:1], **options)
    assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=3, **options), alone)
    effattn.save(model, tmp_path / "saved")
    again = effattn.load(tmp_path / "saved")
    assert torch.equal(again.generate(ids[:1], **options), alone)


def test_what_is_refused():
    q, k, v = qkv(9, torch.Generator().manual_seed(0))
    attn = effattn.backend("topk(window=4, block=8, blocks=2)")
    with pytest.raises(Unsupported, match="topk cannot read packed keys"):
        attn(q, k, v, state=PackedState(Format.parse("int8").fit(D)[0]))
    with pytest.raises(Unsupported, match="int8 has no gradients"):
        attn(q.requires_grad_(), k, v, state=state_of(attn, "int8"))
    rerope = rule_of("rerope(window=3)", head_dim=D, heads=H, length=64)
    with torch.no_grad(), pytest.raises(Unsupported, match="valid is its own growing state"):
        attn(q, k, v, state=state_of(attn, "int8"), rotary=rerope)
    model = tiny("llama", dtype=torch.float32, **SIZES)
    for cache, message in (
        ("int8(residual=6)", "valid is a residual of at least 7"),
        ("int8(pre_rope=True)", "valid is pre_rope=False"),
        ("evict(keep=0.5)", "it goes with dense"),
        ("paged", "paged"),
    ):
        with pytest.raises(Unsupported, match=message):
            effattn.swap(model, "topk(window=4, block=8, blocks=2)", cache=cache)
    effattn.swap(model, "topk(window=4, block=8, blocks=2)", cache="int8")
    with pytest.raises(Unsupported, match="has no static form"):
        effattn.new_cache(model, max_length=64)
