"""Generation after a swap: every way of decoding gives what recomputing everything gives, in
bounded memory.
"""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from effattn import registry
from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.hf.families import FAMILIES
from effattn.hf.state_layer import StateLayer
from effattn.states.full import ROLLBACK
from effattn.surgery.describing import describe
from effattn.surgery.swapping import restore, swap

MODELS = {"llama": {}, "qwen3": {"num_key_value_heads": 2}}
PATTERNS = [
    "dense",
    "block(block=4, look_back=1)",
    "sliding(window=6)",
    "sliding(window=5, sinks=3)",
]
RINGS = PATTERNS[1:]


def model_of(kind="llama", pattern="dense", **changes):
    """A random fp64 model of two layers, swapped."""
    return swap(tiny(kind, **{**MODELS.get(kind, {}), **changes}), pattern)


def batch(rows=3, length=14, padded=True):
    tokens = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if padded and rows > 1:
        mask[0, :5], mask[1, :2] = 0, 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model, inputs, new=20, seed=0, **options):
    torch.manual_seed(seed)
    options = {"do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, max_new_tokens=new, **options)


def recomputed(model, inputs, new=20, **options):
    """The same without a cache: everything is computed anew for each token."""
    return generate(model, inputs, new, use_cache=False, **options)


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_way_of_decoding(kind, pattern):
    model, inputs = model_of(kind, pattern), batch()
    for way, options in WAYS.items():
        assert torch.equal(
            generate(model, inputs, **options), recomputed(model, inputs, **options)
        ), way
    greedy = recomputed(model, inputs)
    assert torch.equal(generate(model, inputs, prefill_chunk_size=3), greedy)
    one = {name: tensor[2:] for name, tensor in inputs.items()}
    assert torch.equal(generate(model, one, prompt_lookup_num_tokens=4), greedy[2:])
    assert torch.equal(generate(model, one, assistant_model=tiny("llama", seed=1)), greedy[2:])


@pytest.mark.parametrize("pattern", RINGS)
def test_padding_changes_nothing(pattern):
    model, inputs = model_of(pattern=pattern), batch()
    got = generate(model, inputs)
    for row, skip in enumerate((5, 2, 0)):
        alone = {name: tensor[row : row + 1, skip:] for name, tensor in inputs.items()}
        assert torch.equal(generate(model, alone)[0], got[row, skip:])


@pytest.mark.parametrize("pattern", [*RINGS, "longformer(window=5, global_tokens=2)"])
def test_memory_is_bounded_at_any_length(pattern):
    model, inputs = model_of("qwen3", pattern), batch(rows=2)
    backend = registry.backend(pattern)
    bound = backend.new_state().keep + ROLLBACK + backend.held(1000) - backend.new_state().ring
    new = 3 * bound
    cache = new_cache(model)
    assert torch.equal(
        generate(model, inputs, new, past_key_values=cache), recomputed(model, inputs, new)
    )
    assert cache.get_seq_length() == 14 + new - 1
    token = describe(model).layers[0]["kv_bytes_per_token"]
    for layer in cache.layers:
        assert (
            layer.nbytes
            == layer.state.nbytes
            == layer.keys.nbytes + layer.values.nbytes
            == 2 * bound * token
        )
        assert layer.get_mask_sizes(1) == (14 + new, 0)
    assert f"{2 * bound * token} bytes" in repr(cache)


@pytest.mark.parametrize("pattern", RINGS)
@pytest.mark.parametrize("prompt", [10, 70])
def test_an_assistant_that_is_always_wrong(pattern, prompt):
    """All 20 candidates are rejected again and again: more than a ring takes back by itself, from
    the first call on.
    """
    model, assistant = model_of(pattern=pattern), tiny("llama", seed=3)
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    inputs, sizes = batch(1, prompt), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    got = generate(model, inputs, 30, assistant_model=assistant)
    assert sizes[0] == prompt + 20
    assert max(sizes[1:]) == 21
    assert torch.equal(got, recomputed(model, inputs, 30))


def test_a_swapped_assistant():
    model, assistant = tiny("llama"), model_of(pattern="sliding(window=6, sinks=2)")
    assistant.generation_config.num_assistant_tokens = ROLLBACK
    inputs = batch(1, 40)
    assert torch.equal(generate(model, inputs, assistant_model=assistant), generate(model, inputs))
    swap(model, "block(block=5)")
    assert torch.equal(
        generate(model, inputs, assistant_model=assistant), recomputed(model, inputs)
    )


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunks_and_crops_by_hand(pattern):
    model, inputs = model_of(pattern=pattern), batch(2, 60)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(**inputs, use_cache=False).logits
    for make in (lambda: None, DynamicCache, lambda: new_cache(model)):
        cache, seen, parts = make(), 0, []
        for size in (1, 30, 3, 1, 20, 5):
            at = slice(seen, seen := seen + size)
            out = model(
                tokens[:, at], attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            parts.append(out.logits)
        real = mask.bool()
        torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], rtol=1e-6, atol=1e-6)
        for back in (0, 7, 9):
            cache.crop(-back)
            seen -= back
        assert cache.get_seq_length() == seen == 44
        out = model(tokens[:, seen:], attention_mask=mask, past_key_values=cache)
        torch.testing.assert_close(out.logits, whole[:, seen:], rtol=1e-6, atol=1e-6)
    if pattern != "dense":
        with pytest.raises(ValueError, match="were evicted"):
            cache.crop(-40)
        with pytest.raises(ValueError, match="crop: got 3, valid is 0 or minus"):
            cache.crop(3)


@torch.no_grad()
@pytest.mark.parametrize("told", [False, True])
def test_recording_the_past(told):
    """`activate_past_recording` on a cache with our layers: a long call can be taken back, but for
    its first token.
    """
    model, tokens = model_of(pattern="sliding(window=4)"), batch(1, 80)["input_ids"]
    cache = new_cache(model)
    model(tokens[:, :30], past_key_values=cache)
    if told:
        cache.activate_past_recording()
    model(tokens[:, 30:60], past_key_values=cache)
    if not told:
        with pytest.raises(ValueError, match="were evicted"):
            cache.crop(-29)
        return
    cache.crop(-25)
    expected = model(tokens[:, :40], use_cache=False).logits[:, 35:]
    torch.testing.assert_close(model(tokens[:, 35:40], past_key_values=cache).logits, expected)


@torch.no_grad()
def test_rows_of_a_cache():
    model, inputs = model_of(pattern="sliding(window=5, sinks=2)"), batch(2, 40, padded=False)
    tokens = inputs["input_ids"]
    cache = model(tokens[:, :30]).past_key_values
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    rows = tokens[[1, 0, 1]]
    expected = model(rows, use_cache=False).logits
    torch.testing.assert_close(
        model(rows[:, 30:35], past_key_values=cache).logits, expected[:, 30:35]
    )
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    cache.batch_select_indices(torch.tensor([False, True, True]))
    torch.testing.assert_close(
        model(rows[1:, 35:], past_key_values=cache).logits, expected[1:, 35:]
    )
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(rows, past_key_values=cache).logits, expected)


def test_offloading_waits_for_the_new_tokens():
    backend = registry.backend("sliding(window=4)")
    layer = StateLayer(0, "sliding(window=4)", backend.new_state())
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    handle, _ = layer.update(k, v)
    layer.offload()
    assert layer._leaving
    layer.attend(backend, q, handle.k, handle.v, None)
    assert not layer._leaving
    assert layer.get_seq_length() == 5


def test_which_layers_a_cache_gets():
    model = model_of("mistral", {"0": "dense", "1": "strided(stride=3)"}, sliding_window=8)
    for cache in (DynamicCache(), DynamicCache(config=model.config), new_cache(model)):
        generate(model, batch(), past_key_values=cache)
        # a window; everything
        assert [type(layer) for layer in cache.layers] == [StateLayer, DynamicLayer]
    mixed = model_of("mistral", {"1": "sliding(window=5)"}, sliding_window=8)
    cache = new_cache(mixed)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, StateLayer]
    assert torch.equal(generate(mixed, batch(), past_key_values=cache), recomputed(mixed, batch()))


@torch.no_grad()
def test_caches_from_before_the_swap():
    model, tokens = tiny("llama"), batch(1, 30)["input_ids"]
    filled = model(tokens[:, :20]).past_key_values
    mix = model(tokens[:, :20]).past_key_values
    # what the 20 tokens saw is the same in these
    for pattern in ("sliding(window=25)", "block(block=32)", "dense"):
        swap(model, pattern)
        expected = model(tokens, use_cache=False).logits[:, 20:]
        torch.testing.assert_close(model(tokens[:, 20:], past_key_values=filled).logits, expected)
        assert [type(layer) for layer in filled.layers] == [DynamicLayer] * 2
        filled.crop(-10)
    swap(model, "sliding(window=25, sinks=2)")
    with pytest.raises(Unsupported, match=r"layer 0 .*DynamicLayer holds rotated keys.*new_cache"):
        model(tokens[:, 20:], past_key_values=mix)
    mine = model(tokens[:, :20]).past_key_values
    swap(model, "sliding(window=24, sinks=2)")
    with pytest.raises(Unsupported, match=r"the cache was filled by sliding.window=25, sinks=2."):
        model(tokens[:, 20:], past_key_values=mine)
    mine.reset()
    model(tokens[:, 20:], past_key_values=mine)
    restore(model)
    with pytest.raises(
        Unsupported, match=r"made by effattn.swap for its own attention.*a cache of its own"
    ):
        model(tokens[:, 20:], past_key_values=mine)
    with pytest.raises(Unsupported, match="updated twice without attention in between"):
        model(tokens[:, 20:], past_key_values=mine)
    with pytest.raises(Unsupported, match="static cache"):
        generate(swap(model, "sliding(window=4)"), batch(), cache_implementation="static")


@torch.no_grad()
def test_a_windowed_cache_from_before_the_swap():
    model, tokens = tiny("mistral", sliding_window=8), batch(1, 30)["input_ids"]
    expected = model(tokens).logits[:, 20:]
    filled = [model(tokens[:, :20]).past_key_values for _ in range(2)]
    swap(model, "dense")
    torch.testing.assert_close(model(tokens[:, 20:], past_key_values=filled[0]).logits, expected)
    swap(model, "sliding(window=12)")
    with pytest.raises(Unsupported, match="DynamicSlidingWindowLayer holds the last 8 tokens only"):
        model(tokens[:, 20:], past_key_values=filled[1])


WINDOWED = ("gemma2", "gemma3_text", "olmo3", "cohere2", "exaone4", "gpt_oss")
OPTIONS = {
    **{kind: {"sliding_window": 128} for kind in WINDOWED},  # as long as a sequence can be
    "smollm3": {"no_rope_layers": [1, 0]},
    "phi3": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_positions_owned_by_the_layer_are_the_models(kind):
    """As long as nothing has left the window, sinks are plain attention: raw keys and our rotation
    give the logits.
    """
    options = OPTIONS.get(kind, {}) | (EXPERTS if kind == "gpt_oss" else {})
    model, inputs = tiny(kind, dtype=torch.float32, **options), batch(3, 20)
    model.set_attn_implementation("eager" if kind in ("gemma2", "gpt_oss") else "sdpa")
    real = inputs["attention_mask"].bool()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    plain = model(**inputs, position_ids=positions).logits[real]
    swap(model, "sliding(window=30, sinks=4)")
    out = model(**inputs, position_ids=positions, use_cache=True)
    torch.testing.assert_close(out.logits[real], plain, rtol=1e-4, atol=1e-4)
    assert [type(layer) for layer in out.past_key_values.layers] == [StateLayer] * 2
    step = {
        "input_ids": inputs["input_ids"][:, :1],
        "attention_mask": torch.cat([inputs["attention_mask"], real[:, -1:]], 1),
    }
    tokens = torch.cat([inputs["input_ids"], step["input_ids"]], dim=1)
    step["position_ids"] = positions[:, -1:] + 1
    places = torch.cat([positions, step["position_ids"]], dim=1)
    given = {"attention_mask": step["attention_mask"], "position_ids": places}
    whole = model(tokens, **given, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(
        model(**step, past_key_values=out.past_key_values).logits, whole, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_sinks_stand_at_their_place_in_the_cache():
    """Far into a text, a window with sinks is what the model computes of sinks and window alone,
    side by side.
    """
    model, tokens = tiny("llama", num_hidden_layers=1), batch(1, 60)["input_ids"]
    kept = torch.cat([tokens[:, :3], tokens[:, -6:]], dim=1)
    expected = model(kept).logits[:, -1]
    swap(model, "sliding(window=6, sinks=3)")
    torch.testing.assert_close(model(tokens).logits[:, -1], expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_sinks_begin_anew_where_positions_restart():
    model = model_of(pattern="sliding(window=6, sinks=3)")
    tokens, positions = (
        batch(2, 6)["input_ids"],
        torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]]),
    )
    mask = torch.tensor([[1] * 6, [0] + [1] * 5])
    found = model(tokens, attention_mask=mask, position_ids=positions).logits
    alone = [model(one).logits[0] for one in (tokens[:1, :3], tokens[:1, 3:], tokens[1:, 1:])]
    torch.testing.assert_close(found[0], torch.cat(alone[:2]))
    torch.testing.assert_close(found[1, 1:], alone[2])


COMPILED = [("dense", "eager"), ("sliding(window=4)", "aot_eager")]


@torch.no_grad()
@pytest.mark.parametrize(("pattern", "compiler"), COMPILED)
def test_compiled_decoding(pattern, compiler):
    torch._dynamo.reset()
    model, tokens = model_of("qwen3", pattern), batch(2, 40)["input_ids"]
    graphs, logits = [], []
    backend = torch._dynamo.lookup_backend(compiler)

    def counted(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    for forward in (model, torch.compile(model, fullgraph=True, backend=counted)):
        cache = new_cache(model)
        model(tokens[:, :30], past_key_values=cache)
        logits.append(
            [forward(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(30, 40)]
        )
        assert cache.get_seq_length() == 40
    torch.testing.assert_close(logits[1], logits[0])
    assert 1 <= len(graphs) <= 4
