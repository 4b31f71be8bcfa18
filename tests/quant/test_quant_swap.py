"""`swap(cache=...)`: checked before anything is changed, described, saved, undone to the same
bits.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import tiny
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.hf.state_layer import StateLayer
from effattn.quant.formats import FORMATS
from effattn.quant.packed.ring import PackedRing
from effattn.quant.packed.state import PackedState
from effattn.quant.rotation import block_of, fold_values, hadamard
from effattn.surgery.checkpoint import load, save
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active, restore, swap

LLAMA = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
IDS = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(0))


def model_of(kind="llama", **changes):
    return tiny(kind, dtype=torch.float32, **{**LLAMA, **changes})


def specs(model) -> list[str]:
    return [layer["cache"] for layer in describe(model).layers]


@torch.no_grad()
def test_layer_by_layer_and_back_to_the_same_bits(tmp_path):
    model = model_of()
    before, modules = model(IDS).logits, dict(model.named_modules())
    assert swap(model, cache={"0": "int8", "1-": "int4(group=32, v=2)"}) is model
    assert specs(model) == [
        "int8 (values: groups of 32 channels instead of 128, head dimension 32)",
        *["int4(group=32, v=2)"] * 2,
    ]
    assert [layer["pattern"] for layer in describe(model).layers] == ["dense"] * 3
    layer = describe(model).to_dict()["layers"][1]
    assert layer["kv_bytes_per_token"] == 2 * (32 * 4 / 8 + 4 + 32 * 2 / 8 + 4)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(model_of().state_dict())
    out = model(IDS)
    # a prompt sees itself in full precision
    torch.testing.assert_close(out.logits, before, rtol=1e-4, atol=1e-4)
    assert [str(one.cache.format) for one in out.past_key_values.layers] == [
        "int8",
        *["int4(group=32, v=2)"] * 2,
    ]
    swap(model, "sliding(window=40)")  # the other axes stay
    assert [type(one.state) for one in new_cache(model).layers] == [PackedRing] * 3
    swap(model, {"2": "dense"}, cache={"0": "full"})
    assert [cache.split("(")[0] for cache in specs(model)] == ["ring", "int4", "int4"]
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert specs(again) == specs(model)
    assert (
        active(again).caches
        == active(model).caches
        == {1: "int4(group=32, v=2)", 2: "int4(group=32, v=2)"}
    )
    generated = [
        m.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, again)
    ]
    assert torch.equal(*generated)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert specs(theirs) == specs(model)
    assert torch.equal(restore(theirs)(IDS).logits, before)
    copied = copy.deepcopy(model)
    assert specs(copied) == specs(model)
    restore(model)
    assert torch.equal(model(IDS).logits, before)
    assert specs(model) == ["full"] * 3
    assert active(model) is None


@torch.no_grad()
def test_positions_and_patterns_beside_it():
    """Raw keys are packed raw, and turned as they are read."""
    for kwargs in (
        {"positions": "rerope(window=24)"},
        {"positions": "yarn(factor=4.0)+logn"},
        {"pattern": "sliding(window=30, sinks=2)"},
        {"positions": "alibi"},
        {"positions": "kerple", "pattern": "sliding(window=30)"},
        {"positions": "sandwich"},
    ):
        model = swap(model_of(), **kwargs)
        expected = model(IDS, use_cache=False).logits
        swap(model, cache="int8(residual=0, group=32)")
        cache = new_cache(model)
        parts = [
            model(part, past_key_values=cache).logits for part in IDS.split([40, 1, 19], dim=1)
        ]
        error = (torch.cat(parts, dim=1) - expected).norm() / expected.norm()
        assert 0 < error < 0.02, kwargs
    with pytest.raises(Unsupported, match="'xpos' cannot go with packed keys"):
        swap(model_of(), positions="xpos", cache="int4")


MISTAKES = [
    ("llama", {"cache": "int3"}, "cache: got 'int3' .did you mean 'int"),
    ("llama", {"cache": "int4(grup=64)"}, "did you mean 'group'"),
    ("llama", {"cache": "int4(group=65)"}, "group: got 65 .nearest: 64"),
    ("llama", {"cache": "full(group=64)"}, "full takes no options"),
    ("llama", {"cache": {"0-1": "int4", "1-": "int8"}}, "layer 1 is in both"),
    ("llama", {"cache": {"7": "int4"}}, "the model has layers 0 to 2"),
    (
        "llama",
        {"pattern": "strided(stride=4)", "cache": "int4"},
        "layers 0, 1, 2: .* packed keys.*strided",
    ),
    ("llama", {"pattern": "linear", "cache": "int8"}, "what linear remembers is"),
    (
        "llama",
        {"pattern": {"1": "sliding(window=4, dilation=2)"}, "cache": "int8"},
        "layers 1: .*without dilation",
    ),
    ("llama", {"cache": "int4(rotate=True, pre_rope=True)"}, "layer 0: .*valid is rotate='v'"),
    (
        "opt",
        {"cache": "int4(pre_rope=True)"},
        "pre_rope=True, and the model has no rotary positions",
    ),
    ("llama", {"cache": "fp8"}, "'fp8': a device without fp8; valid there are int8, int4 and int2"),
]


@pytest.mark.parametrize(("kind", "kwargs", "message"), MISTAKES)
def test_mistakes_change_nothing(kind, kwargs, message, monkeypatch):
    fp8 = replace(FORMATS["fp8"], lacking=lambda device: "a device without fp8")
    monkeypatch.setitem(FORMATS, "fp8", fp8)
    model = (
        model_of()
        if kind == "llama"
        else tiny(kind, dtype=torch.float32, ffn_dim=48, word_embed_proj_dim=64)
    )
    with pytest.raises(ValueError, match=message):
        swap(model, **kwargs)
    assert active(model) is None
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_does_not_fit_is_named():
    with pytest.raises(
        ValueError, match=r"layer 0: cache int2, keys: .* head dimension 6; valid there are"
    ):
        swap(model_of(head_dim=6), cache="int2")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    encoder = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    with pytest.raises(Unsupported, match="an encoder remembers nothing"):
        swap(encoder, cache="int4")
    model = model_of()
    model.model.layers[1].self_attn = Own()
    with pytest.raises(Unsupported, match="layers 1: Own does not go through"):
        swap(model, cache="int4")
    model = swap(model_of(), "sliding(window=9)")
    with pytest.raises(ValueError, match="did you mean"):
        swap(model, "dense", cache="int9")
    assert [layer["pattern"] for layer in describe(model).layers] == ["sliding(window=9)"] * 3


class Own(nn.Module):
    """Computes attention by itself."""

    head_dim, num_key_value_groups, layer_idx = 32, 2, 1

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


@torch.no_grad()
def test_the_format_does_not_change_in_the_middle():
    model = swap(model_of(), cache="int4")
    cache = model(IDS[:, :40]).past_key_values
    full = model_of()(IDS[:, :40]).past_key_values
    swap(model, cache="int8(group=32)")
    with pytest.raises(
        Unsupported, match=r"layer 0 .dense, int8.group=32.*: the cache was filled by dense, int4"
    ):
        model(IDS[:, 40:], past_key_values=cache)
    with pytest.raises(Unsupported, match="DynamicLayer holds tokens in full precision"):
        model(IDS[:, 40:], past_key_values=full)
    assert cache.get_seq_length() == full.get_seq_length() == 40
    swap(model, cache="full")
    with pytest.raises(Unsupported, match="filled by dense, int4"):
        model(IDS[:, 40:], past_key_values=cache)
    swap(model, cache="int4")
    model(IDS[:, 40:], past_key_values=cache)
    assert cache.get_seq_length() == 60
    assert [type(layer) for layer in DynamicCache(config=model.config).layers] == [DynamicLayer] * 3


def test_gradients_are_refused_and_training_without_a_cache_works():
    model = swap(model_of(), cache="int4")
    with pytest.raises(
        Unsupported, match=r"no gradients; valid are torch.no_grad\(\), or use_cache=False"
    ):
        model(IDS, labels=IDS)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "phi"])
def test_rotation(kind):
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close(hadamard(x).norm(), x.norm())
    one = torch.tensor([1.0, 0, 0, 0])
    assert torch.equal(hadamard(one), torch.full((4,), 0.5))
    assert (hadamard(torch.eye(4)) * 2).tolist() == [
        [1, 1, 1, 1],
        [1, -1, 1, -1],
        [1, 1, -1, -1],
        [1, -1, -1, 1],
    ]
    assert (block_of(128), block_of(80), block_of(48)) == (128, 16, 16)
    with pytest.raises(ValueError, match="rotate: got head dimension 7"):
        hadamard(torch.ones(7))
    model = tiny(kind)
    before, projections = model(IDS).logits, ("v_proj.weight", "query_key_value.weight")
    value = next(p for name, p in model.named_parameters() if name.endswith(projections))
    old = value.clone()
    assert fold_values(model) is model
    assert not torch.equal(value, old)
    torch.testing.assert_close(model(IDS).logits, before)
    fold_values(model)
    torch.testing.assert_close(value, old)


def test_a_packed_layer_in_words():
    model = swap(model_of(), cache="int4(group=32)")
    cache = new_cache(model)
    assert all(
        type(layer) is StateLayer and type(layer.state) is PackedState for layer in cache.layers
    )
    model.generate(IDS, past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert f"StateLayer(dense, int4(group=32), 61 tokens, {cache.layers[0].nbytes} bytes)" in repr(
        cache
    )
