"""The anatomy is right for every class it names: views write through, gauge freedoms hold, refusals
name names.
"""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from conftest import SMALL, tiny

from effattn.errors import Unsupported
from effattn.hf import anatomy as hf

ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
# transformers' CPU experts have no fp64
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
LOOSE = 1e-4  # RMSNorm casts to fp32; a mistake moves logits by 0.1 and more
KINDS = sorted(hf.FAMILIES)


EXPERTS = {"gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}}


def model_of(kind: str, **overrides):
    dtype = torch.float32 if kind in MOE else torch.float64
    model = tiny(kind, dtype=dtype, **EXPERTS.get(kind, {}), **overrides)
    if kind == "gpt_oss":
        model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[:96].view(2, 48), use_cache=False).logits.double()


@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_views_of_the_weights(kind, tokens):
    model = model_of(kind)
    before = logits(model, tokens)
    for layer in hf.of(model):
        for part in (layer.q, layer.k, layer.v, layer.o):
            assert part.by_head.data_ptr() >= part.module.weight.data_ptr()
            assert (
                part.by_head.untyped_storage().data_ptr()
                == part.module.weight.untyped_storage().data_ptr()
            )
        assert layer.q.by_head.shape == (8, layer.head_dim, 64)
        assert layer.o.by_head.shape == (8, 64, layer.head_dim)
        # Swap two heads everywhere: a pure renaming, if q, k, v and o are what they say they are.
        order = [1, 0, *range(2, 8)]
        for part in (layer.q, layer.k, layer.v, layer.o):
            part.by_head.copy_(part.by_head[order].clone())
            if part.bias is not None and not part.output:
                rows = part._rows(part.module.bias.detach())
                rows.copy_(rows[order].clone())
        if layer.learned_sinks:
            layer.attention.sinks.detach().copy_(layer.attention.sinks.detach()[order].clone())
    difference = (logits(model, tokens) - before).abs().max()
    assert difference < LOOSE


@pytest.mark.parametrize("kind", [k for k in KINDS if hf.FAMILIES[k].rotary])
def test_rotary_dims_and_pairs(kind, tokens):
    """Turning q and k of a head by the same phase, each frequency its own, changes nothing; and the
    pairs are the ones of the class's own rotate_half."""
    model = model_of(kind)
    before = logits(model, tokens)
    for layer in hf.of(model):
        rotate = getattr(sys.modules[type(layer.attention).__module__], "rotate_half", None)
        if rotate is not None:
            assert (float(rotate(torch.arange(1.0, 5.0))[0]) == -2) == layer.family.interleaved
        real, imaginary = layer.rotary_pairs()
        assert len(real) * 2 == layer.rotary_dims <= layer.head_dim
        angle = torch.linspace(0.3, 2.0, len(real), dtype=model.dtype)[:, None]
        for part in (layer.q, layer.k):
            biases = (
                None
                if part.module.bias is None
                else part._rows(part.module.bias.detach())[..., None]
            )
            for target in (part.by_head, biases):
                if target is None:
                    continue
                re, im = target[:, real].clone(), target[:, imaginary].clone()
                target[:, real] = angle.cos() * re - angle.sin() * im
                target[:, imaginary] = angle.sin() * re + angle.cos() * im
    assert (logits(model, tokens) - before).abs().max() < LOOSE


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPES = [(kind, {}) for kind in KINDS if hf.FAMILIES[kind].rotary] + [
    ("llama", {"rope_parameters": YARN})
]


@pytest.mark.parametrize(("kind", "overrides"), ROPES)
def test_ropes_are_the_models_own_rotation(kind, overrides):
    overrides = overrides | EXPERTS.get(kind, {})
    model, seen = tiny(kind, dtype=torch.float32, num_key_value_heads=2, **overrides), {}
    for layer in hf.of(model):
        hook = lambda *args, i=layer.index: seen.setdefault(i, args[2]["position_embeddings"])  # noqa: E731
        layer.attention.register_forward_pre_hook(
            lambda *args, hook=hook: hook(*args) and None, with_kwargs=True
        )
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 77, 78, 99]])
    model(
        input_ids=torch.ones(2, 6, dtype=torch.long),
        position_ids=positions,
        attention_mask=(positions >= 0).long(),
    )
    count = 0
    for layer in hf.of(model):
        if layer.rotary is None:
            assert layer.rotary_dims == 0
            continue
        count += 1
        rope = layer.rotary.rope()
        assert rope.dims == layer.rotary_dims
        q, k = torch.randn(2, 4, 6, layer.head_dim), torch.randn(2, 2, 6, layer.head_dim)
        apply = sys.modules[type(layer.attention).__module__].apply_rotary_pos_emb
        expected = apply(q[..., : rope.dims], k[..., : rope.dims], *seen[layer.index])
        for x, got, turned in zip((q, k), rope(q, k, positions, positions), expected, strict=True):
            torch.testing.assert_close(
                got, torch.cat([turned, x[..., rope.dims :]], dim=-1), rtol=0, atol=1e-6
            )
        alone, _ = rope(q[:1], k[:1], positions[0], positions[0])
        torch.testing.assert_close(alone, rope(q, k, positions, positions)[0][:1])
        half, _ = rope(q.bfloat16(), k.bfloat16(), positions, positions)
        assert half.dtype == torch.bfloat16
    assert count


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere", "phi", "qwen2"])
def test_logits_from_the_final_norm(kind, tokens):
    model, seen = model_of(kind), {}
    parts = hf.of(model)
    parts.final_norm.register_forward_hook(lambda _, __, output: seen.update(hidden=output))
    expected = logits(model, tokens)
    torch.testing.assert_close(parts.logits(seen["hidden"]).detach(), expected)


GROUPED = [k for k in KINDS if not (hf.FAMILIES[k].gqa or hf.FAMILIES[k].fused == "multi_query")]


@pytest.mark.parametrize("kind", GROUPED)
def test_an_existing_gqa_model_is_read_right(kind):
    layer = hf.of(model_of(kind, num_key_value_heads=2)).layers[0]
    assert (layer.heads, layer.kv_heads) == (8, 2)
    assert layer.k.by_head.shape == layer.v.by_head.shape == (2, layer.head_dim, 64)


@pytest.mark.parametrize("kind", hf.ENCODERS)
@pytest.mark.parametrize("auto", [transformers.AutoModel, transformers.AutoModelForMaskedLM])
def test_encoders(kind, auto):
    model = auto.from_config(transformers.AutoConfig.for_model(kind, **ENCODER))
    parts = hf.of(model)
    assert (len(parts.layers), parts.heads, parts.kv_heads, parts.head_dim, parts.causal) == (
        2,
        4,
        4,
        8,
        False,
    )
    for layer in parts:
        assert layer.rotary is None
        assert layer.window is None
        assert [p.by_head.shape for p in (layer.q, layer.k, layer.v)] == [(4, 8, 32)] * 3
        assert layer.o.by_head.shape == (4, 32, 8)
        assert len(layer.qkv_modules) == 4
        assert len(layer.norms) == 2
    with pytest.raises(Unsupported, match="cannot have fewer KV heads"):
        parts.require_gqa()


def test_windows():
    assert [layer.window for layer in hf.of(model_of("gemma3_text"))] == [32, None]
    assert hf.of(model_of("mistral", sliding_window=32)).layers[0].window == 32
    # no sequence is longer
    assert hf.of(model_of("mistral", sliding_window=128)).layers[0].window is None


def test_unsupported_models_are_refused_by_name():
    gptj = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=8, vocab_size=32)
    )
    with pytest.raises(Unsupported, match=r"GPTJForCausalLM.*effattn\.rehost"):
        hf.of(gptj)
    with pytest.raises(Unsupported, match="Linear"):
        hf.of(torch.nn.Linear(2, 2))
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
        )
    )
    with pytest.raises(Unsupported, match=r"Falcon.*cache"):
        hf.of(falcon)
    for kind in ("gpt_neox", "opt", "gpt2"):
        with pytest.raises(Unsupported, match=r"ignores num_key_value_heads.*effattn\.rehost"):
            hf.of(model_of(kind)).require_gqa()
    with pytest.raises(Unsupported, match="causal LM"):
        hf.of(transformers.LlamaModel(transformers.LlamaConfig(**SMALL)))


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
@torch.no_grad()
def test_a_text_model_with_another_beside_it_is_told_how_to_get_it_alone(kind):
    """What the error says, done: the same logits, from a model that is known."""
    text = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
    )
    if kind == "gemma3":
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision | {"patch_size": 14}
        )
    else:
        text, vision = (
            text | {"model_type": "llama"},
            vision | {"model_type": "clip_vision_model", "patch_size": 14},
        )
        config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    told = (
        r"from_config\(model.config.get_text_config\(\)\); lm.model = model.model.language_model; "
        r"lm.lm_head = model.lm_head;"
    )
    with pytest.raises(Unsupported, match=told):
        hf.of(model)
    alone = transformers.AutoModelForCausalLM.from_config(model.config.get_text_config()).eval()
    alone.model, alone.lm_head = model.model.language_model, model.lm_head
    ids = torch.arange(8)[None]
    torch.testing.assert_close(alone(ids).logits, model(ids).logits)
    assert len(hf.of(alone).layers) == 2
