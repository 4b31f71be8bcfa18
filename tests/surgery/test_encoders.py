"""Encoders: bidirectional patterns in BERT and its kin, padded on either side; what is causal only
is refused.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from effattn.errors import Unsupported
from effattn.heads.gqa import convert_gqa
from effattn.hf.cache import new_cache
from effattn.hf.families import ENCODERS
from effattn.surgery import checkpoint
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active, restore, swap

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
HEADS = {
    "none": transformers.AutoModel,
    "masked": transformers.AutoModelForMaskedLM,
    "labels": transformers.AutoModelForSequenceClassification,
}


def tiny(kind="bert", head="masked", attn="sdpa"):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **SIZES, dim=32, hidden_dim=48, n_layers=3, n_heads=4
    )
    model = HEADS[head].from_config(config, attn_implementation=attn).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return model


def batch(side="both"):
    tokens = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if side in ("left", "both"):
        mask[0, :5] = 0
    if side in ("right", "both"):
        mask[1, 13:] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


@torch.no_grad()
def outputs(model, inputs):
    """What the model says of real tokens, or of rows."""
    out = model(**inputs)[0]
    return out[inputs["attention_mask"].bool()] if out.ndim == 3 else out


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("head", HEADS)
def test_dense_is_the_model_and_back_to_the_same_bits(kind, head):
    model = tiny(kind, head)
    # the first token is pooled
    sides = ("none", "right") if head == "labels" else ("none", "left", "right", "both")
    before = [outputs(model, batch(side)) for side in sides]
    keys = list(model.state_dict())
    swap(model, "dense")
    assert active(model) is not None
    for side, expected in zip(sides, before, strict=True):
        torch.testing.assert_close(outputs(model, batch(side)), expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys
    swap(model, "sliding(window=5)")
    assert not torch.allclose(outputs(model, batch()), outputs(restore(model), batch()), atol=0.01)
    for side, expected in zip(sides, before, strict=True):
        assert torch.equal(outputs(model, batch(side)), expected)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_layers_that_keep_their_own(attn):
    model = tiny(attn=attn)
    before = outputs(model, batch())
    swap(model, {"1": "dense"})
    torch.testing.assert_close(outputs(model, batch()), before, rtol=1e-4, atol=1e-5)


def test_a_window_sees_as_far_on_both_sides():
    model, inputs = swap(tiny(head="none"), "sliding(window=5)"), batch("none")
    with torch.no_grad():
        before = model(**inputs)[0]
        inputs["input_ids"][:, 10] = 5
        changed = (model(**inputs)[0] - before).abs().amax(dim=(0, 2)) > 1e-6
    # three layers, 2 a side
    assert changed.nonzero().flatten().tolist() == list(range(10 - 3 * 2, 10 + 3 * 2 + 1))


@pytest.mark.parametrize(
    "pattern", ["sliding(window=5)", "block(block=4)", "longformer(window=5, global_tokens=[0, 3])"]
)
def test_padding_changes_nothing(pattern):
    model, inputs = swap(tiny(), pattern), batch()
    whole = outputs(model, inputs)
    alone = []
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        positions = mask.nonzero().T  # BERT's positions are those in the batch
        alone.append(
            model(input_ids=inputs["input_ids"][row][mask][None], position_ids=positions)[0][0]
        )
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_longformers_global_projections_are_the_layers_own():
    model, inputs = tiny(), batch()
    pattern = "longformer(window=5, global_tokens=1)"
    before = outputs(model, inputs)
    swap(model, pattern)
    assert describe(model).layers[0]["projections"] == "dense, global separate"
    assert describe(model).layers[0]["cache"] == "none"
    at_first = outputs(model, inputs)
    parameters = {name: p for name, p in model.named_parameters() if "effattn_global" in name}
    assert len(parameters) == 3 * 6
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in parameters.items() if "key_bias" not in name)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)), alpha=0.5)
    changed = (outputs(model, inputs) - at_first).abs().amax(dim=-1) > 1e-6
    assert changed.any()
    assert torch.equal(outputs(restore(model), inputs), before)


REFUSED = [
    (
        "sliding(window=4)",
        "layer 0: sliding: window: got 4, a bidirectional window is odd; valid is 3 or 5",
    ),
    ("sliding(window=5, sinks=2)", "layer 0: sliding: sinks need causal=True"),
    ("longformer(window=6)", "layer 0: longformer: window: got 6, a bidirectional window is odd"),
    ("strided(stride=4)", "layer 0: strided: causal=False is not possible"),
    ({"0": "dense", "1": "strided(stride=4)"}, "layer 1: strided: causal=False is not possible"),
]


@pytest.mark.parametrize(("pattern", "message"), REFUSED)
def test_what_is_causal_only_is_refused_before_anything_is_changed(pattern, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        swap(model, pattern)
    assert active(model) is None
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_other_refusals():
    model = swap(tiny(), "dense")
    with pytest.raises(Unsupported, match="has no cache: it is not causal"):
        new_cache(model)
    with pytest.raises(Unsupported, match="BertForMaskedLM cannot have fewer KV heads"):
        convert_gqa(model, kv_heads=2, calibration=torch.arange(3, 90))
    with pytest.raises(Unsupported, match="output_attentions"):
        swap(tiny(), "linear")(**batch(), output_attentions=True)
    config = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    with pytest.raises(Unsupported, match="cross-attention"):
        swap(transformers.BertLMHeadModel(config), "dense")


def test_bert_as_a_decoder():
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True)).eval()
    swap(model, "sliding(window=4)")
    tokens = batch("none")["input_ids"]
    options = {"max_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(
        model.generate(tokens, **options), model.generate(tokens, **options, use_cache=False)
    )


def test_checkpoints(tmp_path):
    model = swap(
        tiny(head="labels"),
        {"0": "sliding(window=5)", "2": "longformer(window=3, global_tokens=2)"},
    )
    expected = outputs(model, batch())
    checkpoint.save(model, tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert active(loaded) == active(model)
    assert torch.equal(outputs(loaded, batch()), expected)
