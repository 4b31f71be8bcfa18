"""Longformer's global tokens by row of the batch, (B, T): each row gives what it gives by itself
with its own global tokens."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny

import effattn
from effattn.conformance import inputs
from effattn.errors import Unsupported
from effattn.surgery.swapping import swap

TOKENS = 24
CHOSEN = torch.zeros(3, TOKENS, dtype=torch.bool)
CHOSEN[0, [0, 5, 23]] = CHOSEN[1, 11] = True  # and none in the last row


def both_ways(attn, given, **call):
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = attn(*leaves, **call)
    weight = torch.linspace(
        -1,
        1,
        out.shape[2] * out.shape[3],
        dtype=out.dtype,
    )
    grads = torch.autograd.grad((out * weight.view(out.shape[2:])).sum(), leaves)
    return [out.detach(), *grads]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [TOKENS, 9])
def test_rows_by_themselves(causal, tokens):
    given = inputs(tokens, torch.float64)
    attn = effattn.backend("longformer(window=5)")
    chosen = CHOSEN[:, :tokens]
    got = both_ways(
        attn,
        given,
        causal=causal,
        global_mask=chosen,
    )
    reference = effattn.backend("longformer(window=5, impl='reference')")
    torch.testing.assert_close(
        got,
        both_ways(
            reference,
            given,
            causal=causal,
            global_mask=chosen,
        ),
    )
    for row, own in enumerate(chosen):
        one = [x[row : row + 1] for x in given]
        name = f"longformer(window=5, global_tokens={own.nonzero()[:, 0].tolist()})"
        alone = effattn.backend(name if own.any() else "sliding(window=5)")
        want = both_ways(alone, one, causal=causal)
        torch.testing.assert_close([x[row : row + 1] for x in got], want)


def test_padding_anywhere_and_documents():
    given, attn = inputs(TOKENS, torch.float64), effattn.backend("longformer(window=5)")
    mask = torch.ones_like(CHOSEN)
    mask[0, :3] = mask[1, 8:10] = mask[2, 20:] = False
    mask[0, 5] = True
    out = attn(
        *given,
        padding_mask=mask,
        global_mask=CHOSEN,
        causal=False,
    )
    for row in range(3):
        one = [x[row : row + 1, :, mask[row]] for x in given]
        alone = attn(*one, global_mask=CHOSEN[row : row + 1, mask[row]], causal=False)
        torch.testing.assert_close(out[row : row + 1, :, mask[row]], alone)
    numbers = (torch.arange(TOKENS) // 10).expand(3, -1)
    out = attn(*given, documents=numbers, global_mask=CHOSEN)
    for low in (0, 10, 20):
        at = slice(low, low + 10)
        alone = attn(*(x[:, :, at] for x in given), global_mask=CHOSEN[:, at])
        torch.testing.assert_close(out[:, :, at], alone)


@torch.no_grad()
def test_in_a_live_model_as_transformers_calls_it():
    ids = torch.randint(
        3,
        96,
        (3, TOKENS),
        generator=torch.Generator().manual_seed(0),
    )
    model = swap(tiny("llama"), "longformer(window=5)")
    got = model(ids, global_attention_mask=CHOSEN.long(), use_cache=False).logits
    for row in (0, 1):
        own = CHOSEN[row].nonzero()[:, 0].tolist()
        alone = swap(tiny("llama"), f"longformer(window=5, global_tokens={own})")
        alone.load_state_dict(model.state_dict())
        want = alone(ids[row : row + 1], use_cache=False).logits
        torch.testing.assert_close(
            got[row : row + 1],
            want,
            rtol=1e-4,
            atol=1e-4,
        )
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids, global_attention_mask=CHOSEN.long(), use_cache=False).logits
    assert (half - got).norm() < 0.1 * got.norm()
    with pytest.raises(Unsupported, match="global_attention_mask"):
        swap(tiny("llama"), "dense")(ids, global_attention_mask=CHOSEN.long())


def test_what_does_not_fit():
    given, attn = inputs(TOKENS), effattn.backend("longformer(window=5)")
    for wrong in (CHOSEN[:2], CHOSEN.float(), CHOSEN[:, :-1], [1]):
        with pytest.raises(ValueError, match=r"global_mask: expected torch.bool \(3, 24\)"):
            attn(*given, global_mask=wrong)
    with pytest.raises(Unsupported, match="global_mask: got a state too"):
        attn(*given, global_mask=CHOSEN, state=attn.new_state())
    with pytest.raises(ValueError, match="global_mask"):
        effattn.backend("dense")(*given, global_mask=CHOSEN)
