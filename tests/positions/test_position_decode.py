"""Position rules while decoding: keys are stored raw where the rule needs it, so token by token
equals all at once.
"""

from __future__ import annotations

import pytest
import torch
from conftest import tiny

import effattn
from effattn import positions
from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.surgery.swapping import restore, swap

CAUSAL = [
    "rope",
    "yarn(factor=4)+logn",
    "rerope(window=5)+logn",
    "leaky_rerope(window=5, k=3)",
    "xpos",
    "alibi",
    "rope+kerple",
    "sandwich",
    "t5(buckets=6, max_distance=9)",
]
PATTERNS = ["dense", "block(block=6, look_back=1)", "sliding(window=9)"]


def rule_of(spec, heads=4, dims=6, interleaved=False):
    rule = positions.rule(
        spec, length=8, head_dim=8, heads=heads, dims=dims, interleaved=interleaved
    )
    if rule.learned is not None:
        torch.manual_seed(5)
        torch.nn.init.uniform_(rule.learned, 0.1, 1.5)
    return rule.requires_grad_(False)


def qkv(tokens=40, batch=2, heads=4, kv_heads=2):
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, h, tokens, 8, dtype=torch.float64, generator=draw)
        for h in (heads, kv_heads, kv_heads)
    ]


def padding(tokens=40):
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, :7] = False
    return mask


def by_parts(attn, q, k, v, rule, mask, sizes):
    state, seen, parts = attn.new_state(), 0, []
    for size in sizes:
        at = slice(seen, seen := seen + size)
        seen_mask = None if mask is None else mask[:, :seen]
        parts.append(
            attn(
                q[:, :, at],
                k[:, :, at],
                v[:, :, at],
                padding_mask=seen_mask,
                state=state,
                rotary=rule,
            )
        )
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("spec", CAUSAL)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_token_by_token_equals_all_at_once(pattern, spec):
    (q, k, v), attn, rule = qkv(), effattn.backend(pattern, impl="torch"), rule_of(spec)
    for mask, sizes in ((None, [2] + [1] * 38), (padding(), [3, 21, 1, 2, 13])):
        whole = attn(q, k, v, padding_mask=mask, rotary=rule)
        torch.testing.assert_close(by_parts(attn, q, k, v, rule, mask, sizes), whole)
    alone = attn(*(x[:1, :, 7:] for x in (q, k, v)), rotary=rule)
    torch.testing.assert_close(whole[:1, :, 7:], alone)  # left padding changes nothing


@pytest.mark.parametrize(
    "spec",
    [
        "dynamic_ntk(factor=3)",
        "dynamic_pi",
        "dynamic_yarn",
        "longrope(factor=2, long_factor=[1, 2, 3])",
    ],
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_length_so_far_decides_for_all_keys(pattern, spec):
    """A step at length L is what a fresh prefill of L tokens gives its newest token."""
    (q, k, v), attn, rule = qkv(24), effattn.backend(pattern, impl="torch"), rule_of(spec)
    assert rule.raw_keys
    for mask in (None, padding(24)):
        state = attn.new_state()
        for length in range(1, 25):
            new, past = slice(length - 1, length), slice(length)
            seen = None if mask is None else mask[:, :length]
            step = attn(
                q[:, :, new],
                k[:, :, new],
                v[:, :, new],
                padding_mask=seen,
                state=state,
                rotary=rule,
            )
            fresh = attn(
                q[:, :, past], k[:, :, past], v[:, :, past], padding_mask=seen, rotary=rule
            )[:, :, -1:]
            torch.testing.assert_close(step, fresh)
    alone = attn(*(x[:1, :, 7:] for x in (q, k, v)), rotary=rule)[:, :, -1:]
    torch.testing.assert_close(step[:1], alone)


def batch(rows=2, length=19, padded=True):
    tokens = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, : 5 if padded else 0] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model, inputs, new=9, **options):
    return model.generate(
        **inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, **options
    )


MODELS = [
    ("qwen3", None, "rerope(window=6)+logn", {"num_key_value_heads": 2}),
    ("llama", "sliding(window=9)", "leaky_rerope(window=6, k=2)", {}),
    ("mistral", None, "rerope(window=6)", {"sliding_window": 8}),  # the layers' own window
    ("glm", None, "rerope(window=6)", {"partial_rotary_factor": 0.5}),
    ("llama", "sliding(window=7, sinks=2)", "yarn(factor=2)+logn", {}),
    ("llama", None, {"0": "rope+alibi", "1": "xpos"}, {}),
    ("opt", None, "sandwich", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
]


@pytest.mark.parametrize(("kind", "pattern", "spec", "changes"), MODELS)
def test_every_way_of_decoding(kind, pattern, spec, changes):
    model, inputs = tiny(kind, **changes), batch()
    model = swap(model, pattern, positions=spec)
    greedy = generate(model, inputs, use_cache=False)
    cache = new_cache(model)
    assert torch.equal(generate(model, inputs, past_key_values=cache), greedy)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 8
    assert torch.equal(generate(model, inputs, prefill_chunk_size=3), greedy)
    alone = {name: tensor[:1, 5:] for name, tensor in inputs.items()}
    assert torch.equal(generate(model, alone)[0], greedy[0, 5:])
    beams = {"num_beams": 2, "new": 4}
    assert torch.equal(
        generate(model, inputs, **beams), generate(model, inputs, use_cache=False, **beams)
    )


@torch.no_grad()
def test_a_model_with_dynamic_ntk():
    """One layer: its hidden states are the embeddings, so a step equals a fresh prefill at every
    length. transformers' own rule does not, since its cached keys keep the base that they were
    turned with."""
    model = tiny("llama", num_hidden_layers=1, max_position_embeddings=8)
    tokens = batch(padded=False)["input_ids"].repeat(1, 2)
    swap(model, positions="dynamic_ntk(factor=4)")
    cache = new_cache(model)
    for length in range(6, 28):
        new = tokens[:, :6] if length == 6 else tokens[:, length - 1 : length]
        step = model(new, past_key_values=cache).logits[:, -1]
        fresh = model(tokens[:, :length], use_cache=False).logits[:, -1]
        torch.testing.assert_close(step, fresh)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    theirs = tiny("llama", num_hidden_layers=1, max_position_embeddings=8, rope_parameters=rope)
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        theirs(tokens[:, :27], use_cache=False).logits[:, -1], fresh, rtol=1e-5, atol=1e-5
    )
    past = theirs(tokens[:, :6]).past_key_values
    stale = [
        theirs(tokens[:, at : at + 1], past_key_values=past).logits[:, -1] for at in range(6, 27)
    ][-1]
    assert (stale - fresh).abs().max() > 1e-3


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused():
    model, tokens = tiny("llama"), batch(padded=False)["input_ids"]
    cache = model(tokens).past_key_values
    swap(model, positions="rerope(window=6)")
    with pytest.raises(Unsupported, match="holds rotated keys"):
        model(tokens[:, :1], past_key_values=cache)
    swap(model, "sliding(window=5)", positions="rope")
    cache = model(tokens).past_key_values
    swap(model, positions="rerope(window=3)")
    with pytest.raises(Unsupported, match="the cache was filled by sliding"):
        model(tokens[:, :1], past_key_values=cache)
    restore(model)
    assert model(tokens[:, :1], past_key_values=None).logits.isfinite().all()


def test_gradients_through_rings_and_chunks():
    """Training with a state: rings are read by the decode kernels, whose torch path has
    gradients.
    """
    q, k, v = (x.requires_grad_() for x in qkv(30, batch=1))
    attn, rule = (
        effattn.backend("sliding(window=9)", impl="torch"),
        rule_of("leaky_rerope(window=5, k=3)"),
    )
    weight = torch.randn(
        1, 4, 30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    whole = torch.autograd.grad((attn(q, k, v, rotary=rule) * weight).sum(), (q, k, v))
    parts = torch.autograd.grad(
        (by_parts(attn, q, k, v, rule, None, [26, 1, 3]) * weight).sum(), (q, k, v)
    )
    for one, two in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, two)


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    [
        "leaky_rerope(window=6, k=2)+logn",
        "ntk(factor=2, variant='mixed')",
        "dynamic_ntk(factor=2)",
        "dynamic_pi",
        "dynamic_yarn",
        "alibi",
        "kerple",
    ],
)
def test_packed_caches(spec):
    """Raw keys in int8 are turned as they are read: within its error of what a full cache gives,
    and no further.
    """
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    }
    model, inputs = (
        tiny("llama", max_position_embeddings=16, **sizes),
        batch(length=60, padded="dynamic" not in spec),
    )
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    out = {}
    for cache in ("full", "int8(group=32, residual=8)"):
        swap(model, positions=spec, cache=cache)
        past, parts = new_cache(model), []
        for start, end in ((0, 44), (44, 45), (45, 58), (58, 60)):
            chunk = {"attention_mask": mask[:, :end], "past_key_values": past}
            parts.append(model(tokens[:, start:end], **chunk).logits)
        out[cache[:4]] = torch.cat(parts, dim=1)[mask.bool()]
        assert past.layers[0].get_seq_length() == 60
        restore(model)
    off = (out["int8"] - out["full"]).abs().max() / out["full"].abs().max()
    assert 1e-5 < off < 0.02


def test_what_packed_keys_cannot_have():
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    }
    with pytest.raises(
        Unsupported, match="layer 0: rotary: 'xpos' cannot go with packed keys; valid is a full"
    ):
        swap(tiny("llama", **sizes), positions="xpos", cache="int8(group=32)")
    model = swap(tiny("llama", **sizes), positions="dynamic_ntk(factor=2)", cache="int8(group=32)")
    with pytest.raises(Unsupported, match="packed keys where rows are padded"):
        model(**batch())
    model, inputs = (
        swap(tiny("llama", **sizes), positions="alibi"),
        {"input_ids": batch(padded=False)["input_ids"]},
    )
    with (
        torch.no_grad(),
        pytest.raises(Unsupported, match="'alibi' cannot go with packed keys whose length is a te"),
    ):
        model(**inputs, past_key_values=effattn.quant.cache(model, bits=8, max_length=64))
