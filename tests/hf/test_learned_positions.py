"""GPT-2 and GPTBigCode: patterns and caches in models with learned positions and transposed or
shared projections."""

from __future__ import annotations

import pytest
import torch

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy
from tests.conftest import tiny

KINDS = {
    "gpt2": ("gpt2", {}),
    "all heads": ("gpt_bigcode", {}),
    "one": ("gpt_bigcode", {"multi_query": True}),
}
WINDOW = 7


@pytest.fixture(params=KINDS)
def model(request):
    kind, options = KINDS[request.param]
    return tiny(kind, **options)


@pytest.fixture
def ids():
    return torch.randint(1, 96, (2, 30), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, ids, **given):
    return model(ids, use_cache=False, **given).logits


def by_hand(model, ids, window: int):
    """Logits under a mask that lets a query see the `window` newest keys."""
    at = torch.arange(ids.shape[1])
    apart = at[:, None] - at
    sees = (apart >= 0) & (apart < window)
    lowest = torch.finfo(model.dtype).min
    mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, lowest)
    return logits(model, ids, attention_mask=mask[None, None].expand(len(ids), 1, -1, -1))


def test_projections_are_views_of_the_weights(model):
    layer = anatomy.of(model).layers[1]
    x = torch.randn(5, 64, dtype=model.dtype)
    fused = layer.k.module(x)
    both = torch.cat(
        [
            torch.einsum("nD,hdD->nhd", x, part.by_head) + part.bias_by_head
            for part in (layer.q, layer.k, layer.v)
        ],
        dim=1,
    )
    order = both.flatten(1)
    if layer.fused == "per_head":  # as the module has them
        order = both.unflatten(1, (3, layer.heads)).transpose(1, 2).flatten(1)
    torch.testing.assert_close(order, fused)
    layer.k.by_head[0, 0, 0] += 1
    assert not torch.equal(layer.k.module(x), fused)


def test_dense_and_windows(model, ids):
    plain, expected = logits(model, ids), by_hand(model, ids, WINDOW)
    effattn.swap(model, "dense")
    torch.testing.assert_close(logits(model, ids), plain)
    effattn.swap(model, "sliding", window=WINDOW)
    torch.testing.assert_close(logits(model, ids), expected)
    assert not torch.allclose(expected, plain)
    effattn.restore(model)
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("pattern", ["dense", "sliding(window=7, sinks=2)", "linear"])
def test_decoding_is_prefill(pattern, model, ids):
    effattn.swap(model, pattern)
    whole = logits(model, ids)
    with torch.no_grad():
        out = model(ids[:, :20], use_cache=True)
        steps = [out.logits[:, -1]]
        for place in range(20, 30):
            out = model(ids[:, place : place + 1], past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 19:])


def test_generating_with_a_window_and_padding(model, ids):
    effattn.swap(model, "sliding", window=WINDOW)
    kept = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    alone = model.generate(ids[:1, :12], **kept)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1, :12]], dim=1)
    mask = (torch.arange(16) >= 4).long()[None]
    again = model.generate(padded, attention_mask=mask, **kept)
    assert torch.equal(again[:, 4:], alone)


def test_packed_caches_and_costs(ids):
    for kind, options in KINDS.values():
        model = tiny(kind, dtype=torch.float32, **options, num_attention_heads=4)
        effattn.swap(model, cache="int8(group=16, residual=16)")
        assert model.generate(ids, max_new_tokens=4, pad_token_id=0).shape[1] > 30
        told = effattn.describe(model)
        assert {layer["cache"] for layer in told.layers} == {"int8(group=16, residual=16)"}


def test_a_saved_swap_is_loaded(model, ids, tmp_path):
    effattn.swap(model, "sliding", window=WINDOW)
    effattn.save(model, tmp_path / "out")
    again = effattn.load(tmp_path / "out")
    torch.testing.assert_close(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"heads": "mqa"}, r"cannot have fewer KV heads.*effattn\.rehost"),
        ({"heads": "latent(rank=8)"}, "makes q, k and v by one module"),
        ({"projections": "lowrank(rank=4, method='svd')"}, "is a Conv1D, valid is a Linear"),
        ({"positions": "yarn(factor=2)"}, "no rotary"),
    ],
)
def test_what_transposed_weights_cannot_have(asked, message, ids):
    model = tiny("gpt2")
    plain = logits(model, ids)
    with pytest.raises(ValueError, match=message):
        effattn.swap(model, **asked)
    assert torch.equal(logits(model, ids), plain)


def test_pruning_refuses_transposed_weights_by_name(ids):
    model, tokens = tiny("gpt2"), ids.flatten().repeat(20)
    with pytest.raises(Unsupported, match=r"Conv1D.*no plain linear layer"):
        effattn.prune.oneshot(model, method="magnitude")
    with pytest.raises(Unsupported, match=r"Conv1D, of which effattn\.rehost"):
        effattn.prune.structured(model, tokens, ffn=0.5, length=32)
