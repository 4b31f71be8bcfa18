"""Everything in one model: fewer K/V heads, fewer FFN dimensions, packed 2:4 weights, a window, a
packed cache.
"""

import pytest
import torch

import effattn


@pytest.fixture(scope="module")
def shrunk():
    """The embedded model, converted, cut, pruned and packed; and held-out tokens."""
    model, _ = effattn.embedded.load()
    tokens, held_out = (
        effattn.embedded.tokens("train", 5_376),
        effattn.embedded.tokens("validation", 2_048),
    )
    dense = effattn.perplexity(model, held_out, context=512)
    effattn.convert_gqa(model, kv_heads=4, calibration=tokens)
    model, _ = effattn.prune.structured(
        model,
        tokens,
        ffn=0.25,
        criterion="activation",
    )
    effattn.prune.oneshot(
        model,
        tokens,
        method="sparsegpt",
        sparsity="2:4",
    )
    pruned = effattn.perplexity(model, held_out, context=512)
    report = effattn.prune.pack(model)
    return model, held_out, dense, pruned, report


def test_what_each_step_promises_still_holds(shrunk):
    model, held_out, dense, pruned, report = shrunk
    assert model.config.num_key_value_heads == 4
    assert model.config.intermediate_size == 528
    assert len(report.packed) == 28
    assert report.dense == {}
    assert report.bytes_after == report.bytes_before * 17 // 32
    assert effattn.perplexity(model, held_out, context=512) == pytest.approx(pruned, rel=1e-4)
    assert pruned < 4 * dense  # it still is a language model: random weights are at some 4,000


@torch.no_grad()
def test_a_window_and_a_packed_cache_on_top(shrunk, tmp_path):
    model, held_out, *_ = shrunk
    ids = held_out[:400][None]
    before = model(ids).logits
    effattn.swap(model, "sliding(window=256, sinks=4)", cache="int8(residual=32)")
    layer = effattn.describe(model).layers[0]
    assert layer["pattern"] == "sliding(window=256, sinks=4)"
    assert layer["cache"].startswith("int8(")
    assert layer["projections"] == "2:4"
    greedy = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **greedy)
    cache = effattn.new_cache(model)
    logits = model(ids, past_key_values=cache).logits
    plain = model.config.num_hidden_layers * 2 * 4 * 32 * 4 * ids.shape[1]
    assert sum(layer.nbytes for layer in cache.layers) < 0.6 * plain

    effattn.save(model, tmp_path / "all")
    again = effattn.load(tmp_path / "all")
    assert torch.equal(again(ids, past_key_values=effattn.new_cache(again)).logits, logits)
    assert torch.equal(again.generate(ids, **greedy), expected)

    effattn.restore(model)
    assert torch.equal(model(ids).logits, before)
