"""The static form of a packed ring: what the growing one gives and refuses, in tensors that stay
where they are."""

from __future__ import annotations

import pytest
import torch

import effattn
from effattn.positions.rope import Rope
from effattn.quant.formats import Format
from effattn.quant.packed.kind import Packed
from effattn.quant.packed.static_ring import StaticPackedRing
from effattn.specs import parse_spec

# (pattern, format, padding of the second row)
ROWS = {
    "window": ("sliding(window=40)", "int8(group=16, residual=16)", 12),
    "sinks": ("sliding(window=40, sinks=3)", "int4(group=16, residual=32)", 12),
    "rotated": ("sliding(window=20, sinks=2)", "int4(group=16, residual=8, rotate='v')", 0),
    "no residual": ("sliding(window=40, sinks=3)", "int4(group=16, residual=0)", 0),
    "nothing to pack": ("sliding(window=20, sinks=2)", "int8(group=32, residual=64)", 12),
    "block": ("block(block=24)", "int8(group=16, residual=0)", 12),
}
# chunks; negative: so many tokens are taken back
SIZES = (2, 1, 60, *[1] * 34, -1, 1, -4, *[1] * 20, 40, 1, -1, *[1] * 20)
ROPE = Rope(100.0 ** (-torch.arange(0, 16, 2).double() / 16))


def pair(pattern: str, format: str):
    """A backend, and its static and its growing state."""
    name, options = parse_spec(pattern)
    attn = effattn.backend(name, **options, impl="torch")
    kind = Packed(format, Format.parse(format).fit(16)[0])
    return attn, kind.static_state(400, attn), kind.new_state(attn)


def new(tokens: int):
    return [torch.randn(2, heads, tokens, 16) for heads in (4, 2, 2)]


def refusals(state, seen: int) -> list[str | None]:
    """What going back to every earlier length is answered with."""
    found = []
    for n in range(max(0, seen - 30), seen + 2):
        try:
            state.check_crop(n)
            found.append(None)
        except ValueError as error:
            found.append(str(error))
    return found


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_step_for_step_the_same(row):
    torch.manual_seed(0)
    pattern, format, padded = ROWS[row]
    attn, static, growing = pair(pattern, format)
    assert type(static) is StaticPackedRing
    # keys of a pattern with sinks are held raw, and turned to their place in the cache
    rule, kept, seen, taken = ROPE if "sinks" in pattern else None, None, 0, 0
    for size in SIZES:
        if size < 0:
            answers = refusals(static, seen)
            assert answers == refusals(growing, seen)
            if answers[size - 2] is None:  # the last ones are of `seen` and of one more
                seen, taken = seen + size, taken + 1
                static.crop(seen)
                growing.crop(seen)
            continue
        qkv, seen = new(size), seen + size
        mask = torch.arange(seen) >= torch.tensor([[0], [padded]]) if padded else None
        got, want = (
            attn(*qkv, state=state, padding_mask=mask, rotary=rule) for state in (static, growing)
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        where = [x.data_ptr() for x in static.everything() if x is not static.real]
        assert kept in (None, where), "a tensor has moved"
        kept = where
    assert taken
    assert int(static.seq_len) == growing.seq_len == seen
    if not padded:
        assert static.nbytes == static.predicted_bytes(2, 2, 16, 4)
    for state in (static, growing):
        state.reorder(torch.tensor([1, 0]))
        state.repeat(2)
        state.select(torch.tensor([3, 0]))
    qkv, real = new(1), growing.real
    mask = None if real is None else torch.cat([real, real.new_ones(2, 1)], dim=1)
    got, want = (
        attn(*qkv, state=state, padding_mask=mask, rotary=rule) for state in (static, growing)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for state in (static, growing):
        state.reset()
    qkv = new(50)
    got, want = (attn(*qkv, state=state, rotary=rule) for state in (static, growing))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_refused_changes_nothing():
    attn, static, growing = pair("sliding(window=20, sinks=2)", "int4(group=16, residual=8)")
    qkv = new(70)
    for state in (static, growing):
        attn(*qkv, state=state)
    held = [x.clone() for x in static.everything()]
    with pytest.raises(ValueError, match=r"got 70 \+ 331 tokens, valid are at most max_length=400"):
        attn(*new(331), state=static)
    with pytest.raises(effattn.errors.Unsupported, match="causal=True"):
        attn(*new(4), state=static, causal=False)
    q, k, v = new(1)
    with pytest.raises(ValueError, match="only the number of tokens may differ"):
        attn(q.double(), k.double(), v.double(), state=static)
    assert all(map(torch.equal, held, static.everything()))
    with torch.enable_grad(), pytest.raises(effattn.errors.Unsupported, match="gradients"):
        attn(*(x.requires_grad_() for x in new(1)), state=static)
