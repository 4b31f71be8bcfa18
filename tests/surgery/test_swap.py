"""Swapping live transformers models: dense gives the same tokens, restore the same bits, and
nothing is ignored.
"""

import copy
import pickle
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from effattn import registry
from effattn.errors import Unsupported
from effattn.hf import anatomy, live
from effattn.hf.cache import new_cache
from effattn.hf.state_layer import StateLayer
from effattn.patterns.dense import Dense
from effattn.specs import parse_layers
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active, restore, swap

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MHA = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
CONFIGS = {
    "llama": (transformers.LlamaConfig, SIZES),
    "mistral": (transformers.MistralConfig, {**SIZES, "sliding_window": 8}),
    "mistral, no window": (transformers.MistralConfig, {**SIZES, "sliding_window": 256}),
    "qwen2": (transformers.Qwen2Config, SIZES),
    "qwen3": (transformers.Qwen3Config, {**SIZES, "head_dim": 16}),
    "gemma": (transformers.GemmaConfig, {**SIZES, "head_dim": 8}),
    "gemma2": (
        transformers.Gemma2Config,
        {**SIZES, "head_dim": 8, **MIXED, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (transformers.Gemma3TextConfig, {**SIZES, "head_dim": 8, **MIXED}),
    "phi3": (transformers.Phi3Config, {**SIZES, "sliding_window": 8}),
    "gpt_oss": (
        transformers.GptOssConfig,
        {**SIZES, "head_dim": 8, **MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "stablelm": (transformers.StableLmConfig, SIZES),
    "olmo2": (transformers.Olmo2Config, SIZES),
    "gpt_neox": (transformers.GPTNeoXConfig, MHA),
    "opt": (transformers.OPTConfig, {**MHA, "ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def tiny(name="llama", attn="sdpa", **changes):
    """A random model whose logits really depend on its attention."""
    cls, options = CONFIGS[name]
    torch.manual_seed(0)
    # transformers' sdpa has no softcap and no sinks
    attn = "eager" if name in ("gemma2", "gpt_oss") else attn
    model = transformers.AutoModelForCausalLM.from_config(
        cls(**options, **changes), attn_implementation=attn
    ).eval()
    for part, p in model.named_parameters():
        if p.ndim > 1 or "sinks" in part:
            nn.init.normal_(p, std=0.2 if p.ndim > 1 else 2)
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
    return model.generate(
        **inputs, do_sample=False, max_new_tokens=12, min_new_tokens=12, **options
    )


def windows(name):
    """The window of each layer of a tiny model; None: full attention."""
    if name in ("gemma2", "gemma3", "gpt_oss"):
        return [8, None] * 2
    return [8 if name in ("mistral", "phi3") else None] * 4


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
    assert swap(model, "dense") is model
    assert model.config._attn_implementation == live.NAME
    patterns = [layer["pattern"] for layer in describe(model).layers]
    assert patterns == ["dense" if w is None else f"sliding(window={w})" for w in windows(name)]
    assert active(model).specs == dict.fromkeys(range(4), "dense")
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
    swap(model, {"1-2": "dense(impl='reference')"})
    monkeypatch.setattr(
        Dense,
        "attend",
        lambda self, *args: calls.append(args[3].layout.mask) or attend(self, *args),
    )
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
    assert (
        twin.model.layers[0].self_attn._effattn.backend
        is not model.model.layers[0].self_attn._effattn.backend
    )
    restore(model)
    torch.testing.assert_close(logits(twin, batch()), before)
    assert twin.config._attn_implementation == live.NAME
    again = pickle.loads(pickle.dumps(twin))
    assert active(again) == active(twin)
    for copied in (twin, again):
        assert torch.equal(logits(restore(copied), batch()), before)
        assert not any(module._forward_pre_hooks for module in copied.modules())


@pytest.mark.parametrize(
    "spec", ["dense", "sliding(window=4, sinks=2)", "longformer(window=4, global_tokens=2)"]
)
def test_autocast_mixes_dtypes_as_torch_does(spec):
    model, inputs = swap(tiny("qwen3"), spec), batch()
    exact = logits(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logits(model, inputs).float(), exact, rtol=0.1, atol=0.2)
        cache = model(**inputs).past_key_values
        assert {layer.keys.dtype for layer in cache.layers} == {
            torch.bfloat16 if spec != "dense" else torch.float32
        }
        # the cache holds padding
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = model(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
        assert step.logits.isfinite().all()


def test_layers():
    assert parse_layers({"0-3": "a", "4-": "b"}, 6) == {
        **dict.fromkeys(range(4), "a"),
        4: "b",
        5: "b",
    }
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
    (("lsh",), {"round": 4}, "did you mean 'rounds'"),
    (("sliding",), {}, "sliding: window must be given"),
    (("sliding",), {"window": 0}, "sliding: window: got 0"),
    (
        ("sliding",),
        {"window": 4, "sinks": 2, "dilation": 2},
        "sinks and dilation cannot be combined",
    ),
    (
        ("dense",),
        {"positions": "leaky_rerop(window=256, k=2)"},
        "positions: .* .did you mean 'leaky_rerope'",
    ),
    (("dense",), {"cache": "int44(group=64)"}, "cache: got 'int44' .did you mean 'int4'"),
    (("dense",), {"projections": "monach(blocks=16)"}, "did you mean 'monarch'"),
    (("dense",), {"heads": "mla"}, "heads: 'mla' needs a model of another class"),
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
    assert_untouched(model)


def assert_untouched(model):
    """No trace of a swap."""
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(
        "effattn" in name
        for module in model.modules()
        for name in (*vars(module), *module._modules)
    )


def test_heads_go_to_convert_gqa(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "effattn.heads.gqa", type(sys)("effattn.heads.gqa"))

    def convert_gqa(model, kv_heads, calibration=None, *, method="optimal"):
        calls.append((kv_heads, calibration, method))

    sys.modules["effattn.heads.gqa"].convert_gqa = convert_gqa
    sys.modules["effattn.heads.gqa"].job = convert_gqa
    sys.modules["effattn.heads.gqa"].check_kv_heads = lambda wanted, present: None
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


def test_refused_by_name_before_anything_is_changed(monkeypatch):
    bloom = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97)
    gptj = transformers.GPTJConfig(
        n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=97, bos_token_id=0
    )
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for config, spec, message in (
        (
            CONFIGS["gemma2"],
            "capless",
            'Gemma2ForCausalLM .*layers 1, 3: .*soft-capped.*no softcap.*{"0,2": ...}',
        ),
        (CONFIGS["gemma3"], {"1-2": "capless"}, "layers? 1: no bf16 today"),
        (
            (transformers.LlamaConfig, {**SIZES, "rope_parameters": dynamic}),
            "sliding(window=4, sinks=2)",
            "rotary rule 'dynamic' depends on the sequence's length",
        ),
        (bloom, "dense", "BloomForCausalLM"),
        (gptj, "dense", "GPTJForCausalLM"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(registry.BACKENDS, "_known", dict(registry.backends()))
            registry.register("capless")(Capless)
            config = config[0](**config[1]) if isinstance(config, tuple) else config
            model = transformers.AutoModelForCausalLM.from_config(config)
            own = model.config._attn_implementation
            with pytest.raises(Unsupported, match=message):
                swap(model, spec)
            assert active(model) is None
            assert model.config._attn_implementation == own
            assert_untouched(model)
    model = tiny()
    model.model.layers[2].self_attn = OwnAttention()
    with pytest.raises(Unsupported, match="layers 2: OwnAttention does not go through"):
        swap(model, "dense")
    with pytest.raises(Unsupported, match="Linear"):
        swap(nn.Linear(2, 2), "dense")


class Capless(Dense):
    """A backend that has nothing extra, and refuses its first call."""

    extras = ()

    def check_call(self, q, k, v, causal, extras):
        raise Unsupported("no bf16 today")


def test_a_failed_second_swap_leaves_the_first(monkeypatch):
    model = swap(tiny(), "sliding(window=5)")
    before, hooks = logits(model, batch()), [m._forward_pre_hooks.copy() for m in model.modules()]
    with pytest.raises(ValueError, match="window: got -1"):
        swap(model, {"0": "dense", "2": "sliding(window=-1)"})
    assert [m._forward_pre_hooks for m in model.modules()] == hooks
    assert torch.equal(logits(model, batch()), before)


def test_refused_while_running():
    model = swap(tiny(), "dense")
    tokens = batch(False, rows=1, length=6)["input_ids"]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(Unsupported, match="packed documents: a cache holds one document a row"):
        model(tokens, position_ids=packed, use_cache=True)
    with pytest.raises(
        Unsupported, match=r"expected attention_mask \(batch, tokens\), got \(1, 1, 6, 6\)"
    ):
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
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.ones(4)}, "s_aux"),
        ({"dropout": 0.1}, "dropout"),
        ({"position_bias": torch.ones(1)}, "position_bias"),
    ],
)
def test_what_a_model_passes_is_never_ignored(kwargs, message, monkeypatch):
    model = swap(tiny(), "dense")
    x = torch.randn(1, 4, 6, 8)
    module = model.model.layers[1].self_attn
    with monkeypatch.context() as patch:
        patch.setattr(Dense, "extras", ())
        with pytest.raises(Unsupported, match=f"layer 1: .*{message}"):
            live.attention(module, x, x, x, None, **kwargs)
    if message in ("softcap", "s_aux"):  # dense has both
        plain, _ = live.attention(module, x, x, x, None)
        assert not torch.allclose(live.attention(module, x, x, x, None, **kwargs)[0], plain)


def test_new_cache():
    model = swap(tiny(), {"0": "dense", "2": "sliding(window=4)"})
    cache = new_cache(model)
    assert type(cache) is DynamicCache
    assert [type(layer) for layer in cache.layers] == [
        DynamicLayer,
        DynamicLayer,
        StateLayer,
        DynamicLayer,
    ]
    inputs = batch(False)
    assert torch.equal(generate(model, inputs, past_key_values=cache), generate(model, inputs))
    assert [type(layer) for layer in new_cache(tiny("mistral")).layers] == [
        DynamicSlidingWindowLayer
    ] * 4


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
    assert sum(layer["kv_bytes_per_token"] for layer in description.layers) == held / 4
    full = [window is None for window in windows(name)]
    assert [layer["grows"] for layer in description.layers] == full
    grown = sum(layer.kv_bytes_per_token for layer in anatomy.of(model) if layer.window is None)
    assert description.kv_bytes_per_token == grown
    assert ("hold a bounded number" in str(description)) == (not all(full))
    layer = description.layers[0]
    assert layer["heads"] == (
        "gqa(kv_heads=2)" if "num_key_value_heads" in CONFIGS[name][1] else "mha"
    )
    window = windows(name)[0]
    assert (layer["pattern"], layer["cache"]) == (
        ("dense", "full") if window is None else (f"sliding(window={window})", "ring")
    )
    swap(model, {"1": "sliding(window=6, impl='torch')"})
    layer = describe(model).to_dict()["layers"][1]
    assert (layer["pattern"], layer["cache"]) == ("sliding(window=6, impl='torch')", "ring")
    assert "sliding(window=6," in str(describe(model))
