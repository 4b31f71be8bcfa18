"""Generation with packed caches: every way of decoding, on every kind of model, and keys with
outliers.
"""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from outliers import plant_outliers
from transformers import DynamicCache

from effattn import embedded
from effattn.hf.cache import new_cache
from effattn.quant.packed.ring import PackedRing
from effattn.quant.packed.state import PackedState
from effattn.surgery.swapping import restore, swap

SPEC = "int4(residual=0, group=32)"
KINDS = {
    "llama": {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt_neox": {"hidden_size": 128, "num_attention_heads": 4},
    "gemma3_text": {
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": 40,
    },
    "mistral": {
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 40,
    },
}


def model_of(kind="llama", **changes):
    return tiny(kind, dtype=torch.float32, **{**KINDS[kind], **changes})


def batch(rows=2, length=70, padded=0):
    tokens = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :padded] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


NEW = 14


def generate(model, inputs, new=NEW, **options):
    torch.manual_seed(0)
    return model.generate(
        **inputs, max_new_tokens=new, **{"do_sample": False, "eos_token_id": None, **options}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_decoding(kind):
    """Speculation gives the very tokens of plain decoding, at 4 bits and without a residual; at 8
    bits, all gives what full precision gives."""
    model, one, both = model_of(kind), batch(1), batch(2, padded=9)
    ways = (
        {},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prefill_chunk_size": 33},
    )
    ways = ways if kind == "llama" else ways[2:3]
    plain = [generate(model, both, **way) for way in ways]
    swap(model, cache="int8(residual=32, group=32)")
    for way, tokens in zip(ways, plain, strict=True):
        assert (generate(model, both, **way) == tokens).float().mean() > 0.9, way
    swap(model, cache=SPEC)
    cache = new_cache(model)
    greedy = generate(model, one, past_key_values=cache)
    assert torch.equal(generate(model, one, prompt_lookup_num_tokens=4), greedy)
    assistant = tiny("llama", seed=1, dtype=torch.float32)
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(generate(model, one, assistant_model=assistant), greedy)
    windows = {"gemma3_text": [PackedRing, PackedState], "mistral": [PackedRing] * 2}
    assert [type(layer.state) for layer in cache.layers] == windows.get(kind, [PackedState] * 2)
    assert {layer.get_seq_length() for layer in cache.layers} == {70 + NEW - 1}


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["sliding(window=50, sinks=3)", "block(block=32, look_back=1)"])
def test_with_patterns(pattern):
    """A quantized ring: as far from the pattern in full precision as 8 bits are, at any length."""
    model, tokens = model_of(), batch(2, 230)["input_ids"]
    expected = swap(model, pattern)(tokens, use_cache=False).logits
    swap(model, cache="int8(residual=16, group=32)")
    cache, parts = new_cache(model), []
    for part in tokens.split([100, 40, 1, 1, 1, 87], dim=1):
        parts.append(model(part, past_key_values=cache).logits)
    error = (torch.cat(parts, dim=1) - expected).norm() / expected.norm()
    assert 0 < error < 0.02
    state = cache.layers[0].state
    assert state.nbytes == state.predicted_bytes(230, 2, 2, 32, 4)
    cache.crop(-16)
    again = model(tokens[:, -16:], past_key_values=cache).logits
    assert (again - expected[:, -16:]).norm() / expected[:, -16:].norm() < 0.02
    with pytest.raises(ValueError, match="packed for good"):
        cache.crop(-150)
    assert cache.get_seq_length() == 230


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_keys_before_their_rotation(kind):
    model, tokens = model_of(kind), batch(2, 140, padded=7)
    mask = tokens["attention_mask"]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(**tokens, position_ids=places).logits
    swap(model, cache="int8(residual=0, group=32, pre_rope=True)")
    cache, parts = DynamicCache(), []
    for low, high in ((0, 90), (90, 91), (91, 140)):
        out = model(
            tokens["input_ids"][:, low:high],
            attention_mask=mask[:, :high],
            position_ids=places[:, low:high],
            past_key_values=cache,
        )
        parts.append(out.logits)
    real = mask.bool()
    error = (torch.cat(parts, dim=1)[real] - expected[real]).norm() / expected[real].norm()
    assert 0 < error < 0.02
    assert torch.equal(restore(model)(**tokens, position_ids=places).logits, expected)


@torch.no_grad()
def test_outliers_in_channels_of_the_keys():
    """As in Qwen2.5: int4 per token loses the model, per channel (the default) and rotated keys do
    not.
    """
    model, _ = embedded.load()
    plant_outliers(model)
    tokens = embedded.tokens("validation", 224)[None]
    expected = model(tokens).logits[:, 160:].log_softmax(-1)

    def lost(spec: str) -> float:
        """KL to full precision, nats a token, of 64 tokens that see 160 packed ones."""
        swap(model, cache=spec)
        cache = new_cache(model)
        model(tokens[:, :160], past_key_values=cache)
        got = model(tokens[:, 160:], past_key_values=cache).logits.log_softmax(-1)
        return float((expected.exp() * (expected - got)).sum(-1).mean())

    default, per_token = (
        lost("int4(residual=0, group=32)"),
        lost("int4(residual=0, k_axis='token', group=32)"),
    )
    assert default < 0.02
    assert per_token > 20 * default
    assert lost("int4(residual=0, k_axis='token', group=32, rotate='k')") < per_token / 4
