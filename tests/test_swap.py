"""Swapping dense into live transformers models: the same tokens, and back to the same bits."""

import copy
import pickle
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from effattn.errors import Unsupported
from effattn.hf import live
from effattn.hf.cache import new_cache
from effattn.hf.describe import describe
from effattn.hf.swap import active, parse_layers, restore, swap
from effattn.patterns.dense import Dense

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MHA = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
CONFIGS = {
    "llama": (transformers.LlamaConfig, SIZES),
    "mistral": (transformers.MistralConfig, {**SIZES, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, SIZES),
    "qwen3": (transformers.Qwen3Config, {**SIZES, "head_dim": 16}),
    "gemma": (transformers.GemmaConfig, {**SIZES, "head_dim": 8}),
    "gemma3": (transformers.Gemma3TextConfig, {**SIZES, "head_dim": 8, **MIXED}),
    "phi3": (transformers.Phi3Config, {**SIZES, "sliding_window": None}),
    "stablelm": (transformers.StableLmConfig, SIZES),
    "olmo2": (transformers.Olmo2Config, SIZES),
    "gpt_neox": (transformers.GPTNeoXConfig, MHA),
    "opt": (transformers.OPTConfig, {**MHA, "ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def tiny(name="llama", attn="sdpa", **changes):
    """A random model whose logits really depend on its attention."""
    cls, options = CONFIGS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cls(**options, **changes), attn_implementation=attn).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return model


def batch(padded=True, rows=3, length=14):
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 97, (rows, length), generator=draw)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :5], mask[1, :2] = 0, 0
        tokens[mask == 0] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def generate(model, inputs, **options):
    return model.generate(**inputs, do_sample=False, max_new_tokens=12, min_new_tokens=12, **options)


def pattern(name):
    return {"1,3": "dense"} if name == "gemma3" else "dense"


@pytest.mark.parametrize("name", CONFIGS)
def test_same_tokens_and_back_to_the_same_bits(name):
    model = tiny(name)
    runs = {
        "padded": lambda: generate(model, batch()),
        "beams": lambda: generate(model, batch(), num_beams=3),
        "lookup": lambda: generate(model, batch(False, rows=1), prompt_lookup_num_tokens=3),
    }
    before = {run: f() for run, f in runs.items()}
    plain = [logits(model, batch(padded)) for padded in (True, False)]
    keys = list(model.state_dict())
    assert swap(model, pattern(name)) is model
    assert model.config._attn_implementation == live.NAME
    for run, f in runs.items():
        assert torch.equal(f(), before[run]), run
    for expected, padded in zip(plain, (True, False), strict=True):
        torch.testing.assert_close(logits(model, batch(padded)), expected, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == keys
    restore(model)
    for expected, padded in zip(plain, (True, False), strict=True):
        assert torch.equal(logits(model, batch(padded)), expected)


def test_the_backend_really_runs(monkeypatch):
    model, calls = tiny(), []
    attend = Dense.attend
    monkeypatch.setattr(Dense, "attend", lambda self, *args: calls.append(args[4]) or attend(self, *args))
    swap(model, {"1-2": "dense(impl='reference')"})
    logits(model, batch())
    assert len(calls) == 2
    assert torch.equal(calls[0], batch()["attention_mask"].bool())
    logits(model, batch(False))
    assert calls[-1] is None  # nothing is padded


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_swapping_twice_then_restoring(attn):
    model = tiny(attn=attn)
    before = logits(model, batch())
    seen = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    swap(model, {"0-1": "dense"})
    swap(model, {"1-": "dense(impl='torch')"})
    assert active(model).specs == {0: "dense", **dict.fromkeys((1, 2, 3), "dense(impl='torch')")}
    logits(model, batch())
    assert len(seen) == 1  # the user's hook stays on
    restore(model)
    assert torch.equal(logits(model, batch()), before)
    assert len(seen) == 2
    assert model.config._attn_implementation == attn
    assert active(model) is None
    assert restore(model) is model


def test_copies_and_pickles_keep_the_swap():
    model = tiny()
    before = logits(model, batch())
    swap(model, "dense")
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].self_attn._effattn.backend is not model.model.layers[0].self_attn._effattn.backend
    restore(model)
    torch.testing.assert_close(logits(twin, batch()), before)
    assert twin.config._attn_implementation == live.NAME
    again = pickle.loads(pickle.dumps(twin))
    assert active(again) == active(twin)


def test_training():
    inputs = batch()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    grads = []
    for swapped in (False, True):
        model = tiny().train()
        if swapped:
            swap(model, "dense")
        model(**inputs).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


def test_autocast_mixes_dtypes_as_torch_does():
    model = swap(tiny(), "dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(logits(model, batch())).all()


def test_layers():
    assert parse_layers({"0-3": "a", "4-": "b"}, 6) == {**dict.fromkeys(range(4), "a"), 4: "b", 5: "b"}
    assert parse_layers({"0, 2-3": "a", 5: "b"}, 6) == {0: "a", 2: "a", 3: "a", 5: "b"}


MISTAKES = [
    (({"0-3": "dense", "3-": "dense"},), {}, "layer 3 is in both '0-3' and '3-'"),
    (({"0-4": "dense"},), {}, "got layers '0-4', the model has layers 0 to 3"),
    (({"2-1": "dense"},), {}, "got layers '2-1'"),
    (({"-1": "dense"},), {}, 'got layers \'-1\', valid are "3", "0-3"'),
    (({},), {}, "empty dict"),
    (({"0": "dense", "1": "dens"},), {}, "did you mean 'dense'"),
    (("dense",), {"imp": "torch"}, "did you mean 'impl'"),
    (({"0": "dense"},), {"impl": "torch"}, "impl given beside a dict"),
    ((), {}, "nothing to do"),
    ((), {"heads": "mha", "window": 3}, "window given without a pattern"),
    (("sliding",), {"window": 512}, "'sliding' is planned"),
    (("dense",), {"positions": "rerope(window=256)"}, "positions: .* planned, not in this version"),
    (("dense",), {"positions": "rrope"}, "positions: got 'rrope' .did you mean 'rerope'"),
    (("dense",), {"cache": "int4(group=64)"}, "cache: .* planned"),
    (("dense",), {"projections": "monarch(blocks=16)"}, "projections: .* planned"),
    (("dense",), {"heads": "mla"}, "heads: 'mla' is planned"),
    (("dense",), {"heads": "gqa"}, "kv_heads must be given"),
    (("dense",), {"heads": "mqa(kv_heads=2)"}, "mqa takes no kv_heads"),
    (("dense",), {"heads": "gqa(kv_heads=1, methd='mean')"}, "did you mean 'method'"),
    (("dense",), {"heads": "gqa(kv_heads=1)"}, "calibration"),
]


@pytest.mark.parametrize(("args", "options", "message"), MISTAKES)
def test_mistakes_change_nothing(args, options, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        swap(model, *args, **options)
    assert active(model) is None
    assert model.config._attn_implementation == "sdpa"


def test_heads_go_to_convert_gqa(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "effattn.heads.gqa", type(sys)("effattn.heads.gqa"))

    def convert_gqa(model, kv_heads, calibration=None, *, method="optimal"):
        calls.append((kv_heads, calibration, method))

    sys.modules["effattn.heads.gqa"].convert_gqa = convert_gqa
    tokens = torch.arange(9)
    swap(tiny(), heads="gqa(kv_heads=1, method='mean')", calibration=tokens)
    swap(tiny(), "dense", heads="mqa", calibration=tokens)
    swap(tiny("gpt_neox"), heads="mha")  # it is already
    assert calls == [(1, tokens, "mean"), (1, tokens, "optimal")]


def test_heads_and_pattern_at_once():
    model = swap(tiny(), "dense", heads="gqa(kv_heads=1, method='mean', refit=False)")
    swapped = logits(model, batch())
    assert describe(model).layers[0]["heads"] == "mqa"
    torch.testing.assert_close(logits(restore(model), batch()), swapped)


class OwnAttention(nn.Module):
    """Computes attention by itself, as older model classes do."""

    head_dim, num_key_value_groups, layer_idx = 8, 2, 0

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


def test_refused_by_name_before_anything_is_changed():
    capped = transformers.Gemma2Config(**SIZES, head_dim=8)
    bloom = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97)
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97)
    for config, message in (
        (capped, "Gemma2ForCausalLM .*soft-capped"),
        (transformers.MistralConfig(**SIZES, sliding_window=16), "MistralForCausalLM .*sliding window of 16"),
        (transformers.Gemma3TextConfig(**SIZES, head_dim=8, **MIXED), 'layers 0, 2: .*can be swapped: {"1,3": ...}'),
        (bloom, "BloomForCausalLM"),
        (gpt2, "GPT2LMHeadModel"),
    ):
        model = transformers.AutoModelForCausalLM.from_config(config)
        own = model.config._attn_implementation
        with pytest.raises(Unsupported, match=message):
            swap(model, "dense")
        assert active(model) is None
        assert model.config._attn_implementation == own
    model = tiny()
    model.model.layers[2].self_attn = OwnAttention()
    with pytest.raises(Unsupported, match="layers 2: OwnAttention does not go through"):
        swap(model, "dense")
    with pytest.raises(Unsupported, match="Linear"):
        swap(nn.Linear(2, 2), "dense")


def test_refused_while_running():
    model = swap(tiny(), "dense")
    tokens = batch(False, rows=1, length=6)["input_ids"]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    for use_cache in (False, True):
        with pytest.raises(Unsupported, match="packed documents"):
            model(tokens, position_ids=packed, use_cache=use_cache)
    with pytest.raises(Unsupported, match=r"expected attention_mask \(batch, tokens\), got \(1, 1, 6, 6\)"):
        model(tokens, attention_mask=torch.ones(1, 1, 6, 6).tril())
    with pytest.raises(Unsupported, match="static cache"):
        generate(model, {"input_ids": tokens}, cache_implementation="static")
    cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask: expected \(batch, 7\).*got \(1, 1\)"):
        model(tokens[:, :1], attention_mask=torch.ones(1, 1), past_key_values=cache)
    restore(model).set_attn_implementation(live.NAME)
    with pytest.raises(Unsupported, match="not by hand"):
        model(tokens)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"softcap": 30.0}, "softcap"), ({"s_aux": torch.ones(4)}, "s_aux"), ({"sliding_window": 4}, "window is 4"),
     ({"dropout": 0.1}, "dropout"), ({"output_attentions": True}, "output_attentions")],
)  # fmt: skip
def test_what_a_model_passes_is_never_ignored(kwargs, message):
    model = swap(tiny(), "dense")
    x = torch.randn(1, 4, 6, 8)
    module = model.model.layers[1].self_attn
    with pytest.raises(Unsupported, match=f"layer 1: .*{message}"):
        live.attention(module, x, x, x, None, **kwargs)
    live.attention(module, x, x, x, None, sliding_window=6)


def test_new_cache():
    model = swap(tiny(), "dense")
    cache = new_cache(model)
    assert type(cache) is DynamicCache
    inputs = batch(False)
    assert torch.equal(generate(model, inputs, past_key_values=cache), generate(model, inputs))


@pytest.mark.parametrize("name", CONFIGS)
def test_describe(name):
    model = tiny(name)
    description = describe(model)
    assert description.parameters["total"] == sum(p.numel() for p in model.parameters())
    assert description.parameters["other"] == (
        model.model.decoder.embed_positions.weight.numel() if name == "opt" else 0
    )
    assert sum(description.shares.values()) == pytest.approx(2)  # the parts and the total
    cache = model(**batch(False, rows=1, length=4)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert description.kv_bytes_per_token == held / 4
    layer = description.layers[0]
    assert layer["heads"] == ("gqa(kv_heads=2)" if "num_key_value_heads" in CONFIGS[name][1] else "mha")
    assert (layer["pattern"], layer["cache"]) == (
        ("sliding(window=8)", "ring") if name == "gemma3" else ("dense", "full")
    )
    swap(model, {"1": "dense(impl='torch')"})
    assert describe(model).to_dict()["layers"][1]["pattern"] == "dense(impl='torch')"
    assert "dense(impl='torch')" in str(describe(model))
