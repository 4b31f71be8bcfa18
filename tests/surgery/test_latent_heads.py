"""A live model with latent keys and values: every way of decoding gives what recomputing gives, a
cache holds r numbers a token, and a checkpoint brings it back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import tiny
from test_generation import WAYS, batch, generate, recomputed
from transformers import DynamicCache

from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.states.full import ROLLBACK
from effattn.states.latent import LatentState
from effattn.surgery.checkpoint import load, save
from effattn.surgery.describing import describe
from effattn.surgery.replace import matrices_of
from effattn.surgery.swapping import restore, swap

IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 96, (1024,), generator=torch.Generator().manual_seed(2))
MODELS = {"llama": {}, "qwen3": {"num_key_value_heads": 2}, "opt": {}}


def latent_model(kind="llama", pattern=None, heads="latent(rank=12)", **options):
    """A random model of two layers with latents."""
    model = tiny(kind, **MODELS.get(kind, {}), **options.pop("changes", {}))
    return swap(model, pattern, heads=heads, calibration=TOKENS, **options)


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=IDS, **options).logits


def assert_steps_are_prefill(model, pieces=(11, 1, 1, 20, 1, 6), packed=False):
    """packed: of a prefill that sees what a cache holds."""
    given = {"past_key_values": new_cache(model)} if packed else {"use_cache": False}
    whole, cache = logits(model, **given), new_cache(model)
    with torch.no_grad():
        parts = [
            model(input_ids=some, past_key_values=cache).logits for some in IDS.split(pieces, 1)
        ]
    difference = (torch.cat(parts, dim=1) - whole).abs().max()
    # Cohere turns in fp32, whatever the model's dtype
    assert difference < (1e-6 if whole.dtype == torch.float64 else 1e-4)
    return cache


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("llama", "dense"),
        ("qwen3", "block(block=4, look_back=1)"),
        ("llama", "sliding(window=5, sinks=3)"),
        ("opt", "dense"),
    ],
)
def test_every_way_of_decoding(kind, pattern):
    model, inputs = latent_model(kind, pattern), batch()
    for way, options in WAYS.items():
        found = generate(model, inputs, 12, **options)
        assert torch.equal(found, recomputed(model, inputs, 12, **options)), way
    greedy = recomputed(model, inputs, 12)
    assert torch.equal(generate(model, inputs, 12, prefill_chunk_size=3), greedy)
    one = {name: tensor[2:] for name, tensor in inputs.items()}
    assert torch.equal(generate(model, one, 12, prompt_lookup_num_tokens=4), greedy[2:])
    assert_steps_are_prefill(model)


@pytest.mark.parametrize("kind", ["olmo2", "stablelm", "gemma2", "gemma3_text", "cohere", "glm"])
def test_steps_are_prefill_in_every_kind_of_layer(kind):
    """Norms over heads or all, windows of their own, softcaps, partial and interleaved RoPE."""
    assert_steps_are_prefill(latent_model(kind, heads="latent(ratio=0.3)"))


@pytest.mark.parametrize(
    "rule", ["rerope(window=8)", "yarn(factor=4)", "alibi", "rope+alibi", "nope", "logn"]
)
def test_position_rules(rule):
    model = latent_model(positions=rule)
    assert_steps_are_prefill(model)
    assert describe(model).layers[0]["positions"].startswith(rule.split("(")[0])


def test_bytes_are_counted():
    model = latent_model(heads="latent(ratio=0.4)", changes={"dtype": torch.float32})
    cache = assert_steps_are_prefill(model)
    rows = describe(model).layers
    assert sum(row["kv_bytes_per_token"] for row in rows) <= 0.4 * 2 * 2 * 64 * 4
    for layer, row in zip(cache.layers, rows, strict=True):
        rank = row["kv_bytes_per_token"] // 4
        assert row["heads"] == f"latent(rank={rank})"
        assert row["projections"] == "dense"
        assert isinstance(layer.state, LatentState)
        assert layer.nbytes == 2 * 40 * rank * 4  # rows x tokens x rank x itemsize


def test_a_ring_of_latents_is_bounded():
    model = latent_model(pattern="sliding(window=5, sinks=3)")
    cache = assert_steps_are_prefill(model)
    assert cache.layers[0].nbytes == 2 * (5 + ROLLBACK + 3) * 12 * 8


def test_bf16_steps_are_near_prefill():
    model = latent_model(changes={"dtype": torch.bfloat16})
    whole, cache = logits(model, use_cache=False), new_cache(model)
    with torch.no_grad():
        steps = [model(input_ids=one, past_key_values=cache).logits for one in IDS.split(1, dim=1)]
    exact = logits(copy.deepcopy(model).double(), use_cache=False)
    error, plain = ((x.double() - exact).norm() for x in (torch.cat(steps, dim=1), whole))
    assert error < 2 * plain


def test_rows_and_crops():
    model = latent_model()
    whole, cache = logits(model, use_cache=False), new_cache(model)
    with torch.no_grad():
        model(input_ids=IDS[:, :30], past_key_values=cache)
        cache.crop(-10)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 3, 0, 1]))
        cache.batch_select_indices(torch.tensor([2, 0]))
        found = model(input_ids=IDS[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(found, whole[:, 20:])
    assert cache.layers[0].get_seq_length() == 40


def test_a_second_padded_turn():
    """New padding in some rows: each row's latents are held by themselves from then on."""
    model, mask = latent_model(), torch.ones_like(IDS)
    mask[0, 15:22] = 0
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model(input_ids=IDS, attention_mask=mask, position_ids=places, use_cache=False)
        cache, parts = new_cache(model), []
        for low, high in ((0, 12), (12, 25), (25, 26), (26, 40)):
            some = {"input_ids": IDS[:, low:high], "attention_mask": mask[:, :high]}
            some |= {"position_ids": places[:, low:high], "past_key_values": cache}
            parts.append(model(**some).logits)
    difference = (torch.cat(parts, dim=1) - whole.logits)[mask.bool()].abs().max()
    assert difference < 1e-9


@pytest.mark.parametrize("pattern", [None, "sliding(window=6, sinks=2)"])
def test_a_checkpoint_brings_it_back(pattern, tmp_path):
    model = latent_model("qwen3", pattern, heads="latent(ratio=0.3)")
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(logits(again, use_cache=False), logits(model, use_cache=False))
    assert describe(again).layers == describe(model).layers
    assert_steps_are_prefill(again)
    names = {name for name in again.state_dict() if "layers.0.self_attn" in name}
    assert "model.layers.0.self_attn.effattn_latent.down.weight" in names
    # after `import effattn` plain transformers knows what its weights are
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(theirs, use_cache=False), logits(model, use_cache=False))


@pytest.mark.parametrize(
    "spec", ["latent(rank=0)", "latent", "gqa(kv_heads=2)", 12, "latent(rank="]
)
def test_records_that_no_swap_writes_are_refused(spec, tmp_path):
    import json

    save(latent_model(), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["effattn"]["heads"]["1"] = spec
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="heads: 1"):
        load(tmp_path / "out")


def test_copies_have_their_own():
    model = latent_model()
    before = logits(model, use_cache=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_steps_are_prefill(twin)
        with torch.no_grad():
            for parameter in model.model.layers[0].self_attn.parameters():
                parameter.mul_(2)
        assert torch.equal(logits(twin, use_cache=False), before)
        with torch.no_grad():
            for parameter in model.model.layers[0].self_attn.parameters():
                parameter.div_(2)


def test_patterns_change_and_restore_keeps_the_heads():
    model = latent_model()
    dense = logits(model, use_cache=False)
    swap(model, "sliding(window=6)")
    assert describe(model).layers[0]["cache"] == "ring"
    assert_steps_are_prefill(model)
    restore(model)
    assert describe(model).layers[0]["heads"] == "latent(rank=12)"
    torch.testing.assert_close(logits(model), dense, rtol=1e-5, atol=1e-5)
    swap(model, "dense")
    assert_steps_are_prefill(model)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("llama", None),
        ("qwen3", "block(block=4, look_back=1)"),
        ("llama", "sliding(window=5, sinks=3)"),
    ],
)
@pytest.mark.parametrize("cache", ["int8", "int4(group=16)", "fp8"])
def test_packed_latents(kind, pattern, cache):
    """Each token by itself: every way of decoding is that of recomputing, rings and beams too."""
    model, inputs = latent_model(kind, pattern, cache=cache), batch()
    found = assert_steps_are_prefill(model, packed=True)
    assert isinstance(found.layers[0].state, LatentState)
    for way, options in WAYS.items():
        tokens = generate(model, inputs, 12, **options)
        assert torch.equal(tokens, _over_packed(model, inputs, 12, options)), way


def _over_packed(model, inputs, tokens: int, options: dict) -> torch.Tensor:
    """As `recomputed`, but by calls that see what a cache would hold, packed."""
    forward = model.forward

    def packed(*args, use_cache=False, past_key_values=None, **given):
        cache = new_cache(model)
        return forward(*args, past_key_values=cache, use_cache=True, **given)

    model.forward = packed
    try:
        return recomputed(model, inputs, tokens, **options)
    finally:
        del model.forward


def test_packed_latents_are_few_bytes(tmp_path):
    model = latent_model(heads="latent(rank=16)", cache="int4")
    cache = assert_steps_are_prefill(model, packed=True)
    # a group of 16: a scale and a zero of two bytes, and half a byte a number
    assert cache.layers[0].nbytes == 2 * 40 * (4 + 8)
    row = describe(model).layers[0]
    assert (row["heads"], row["kv_bytes_per_token"]) == ("latent(rank=16)", 12)
    assert row["cache"].startswith("int4")
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert describe(again).layers == describe(model).layers
    with torch.no_grad():
        found = again(input_ids=IDS, past_key_values=new_cache(again)).logits
        mine = model(input_ids=IDS, past_key_values=new_cache(model)).logits
    assert torch.equal(found, mine)


def test_errors_of_packed_latents_are_small():
    model = latent_model()
    exact = logits(model)
    for cache, most in (("int8", 0.01), ("int4(group=16)", 0.15)):
        swap(model, cache=cache)
        error = logits(model, past_key_values=new_cache(model)) - exact
        assert 0 < error.norm() < most * exact.norm()
    swap(model, cache="full")
    assert torch.equal(logits(model), exact)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("int8(residual=64)", "residual: .* each token by itself; valid there are group and"),
        ("int4(pre_rope=True)", "pre_rope: "),
        ("int2(v=4)", "v: "),
    ],
)
def test_options_that_mean_nothing_of_latents_are_refused(cache, message):
    model = tiny("llama")
    before = logits(model)
    with pytest.raises(Unsupported, match=message):
        swap(model, heads="latent(rank=12)", calibration=TOKENS, cache=cache)
    assert torch.equal(logits(model), before)


def test_ranks_that_cannot_be_packed_are_refused():
    model = latent_model(heads="latent(rank=11)")
    with pytest.raises(Unsupported, match=r"latents of 11.*share a byte"):
        swap(model, cache="int4")


def test_projections_leave_keys_and_values():
    model = latent_model()
    swap(model, projections="monarch(blocks=4)")
    assert {name.rpartition(".")[2] for name in matrices_of(model)} == {"q_proj", "o_proj"}
    assert_steps_are_prefill(model)


def test_gradients_reach_every_part():
    model = latent_model()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    attention = model.model.layers[0].self_attn
    assert all(p.grad is not None and p.grad.any() for p in attention.parameters())


def test_what_cannot_be_is_refused():
    model = tiny("llama", head_dim=16)
    before = logits(model)
    for pattern, options, message in (
        ("lsh(buckets=4)", {}, "its keys and values are latents, and what lsh remembers is"),
        (None, {"cache": "int8(residual=16)"}, "are latents, which are packed each token by"),
        (None, {"projections": "monarch(blocks=4)"}, "valid is one call for each, heads first"),
    ):
        with pytest.raises(Unsupported, match=message):
            swap(model, pattern, heads="latent(rank=8)", calibration=TOKENS, **options)
    with pytest.raises(ValueError, match=r"latent: option: got 'rnk' \(did you mean 'rank'\?\)"):
        swap(model, heads="latent(rnk=8)", calibration=TOKENS)
    assert torch.equal(logits(model), before)
    model = latent_model()
    cache = DynamicCache(config=restore(copy.deepcopy(model)).config)
    with torch.no_grad():
        restore(copy.deepcopy(model))(input_ids=IDS, past_key_values=cache)
    with pytest.raises(Unsupported, match="holds keys and values; start with an empty cache"):
        model(input_ids=IDS, past_key_values=cache)


def test_a_step_makes_latents_once(monkeypatch):
    """Its memory, its keys and its values come of the same ones; and of new weights, anew."""
    model, made = latent_model(), []
    down = model.model.layers[0].self_attn.effattn_latent.down
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        "effattn.projections.latent.linear",
        lambda x, weight, *bias: made.append(weight) or linear(x, weight, *bias),
    )
    cache = new_cache(model)
    with torch.no_grad():
        model(input_ids=IDS[:, :30], past_key_values=cache)
        made.clear()
        model(input_ids=IDS[:, 30:31], past_key_values=cache)
        assert sum(weight is down.weight for weight in made) == 1
        x = torch.randn(1, 3, 64, dtype=torch.float64)
        attention = model.model.layers[0].self_attn
        attention.effattn_latent(x)
        down.weight.mul_(2)
        key = attention.k_proj(x)
        assert torch.equal(key, attention.k_proj(x.clone()))


def test_no_more_is_done_in_a_step_than_must_be():
    """Calls into torch, of a step over few tokens, beside plain transformers'."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    def calls(model) -> int:
        with torch.no_grad():
            cache = model(input_ids=IDS[:1], use_cache=True).past_key_values
            model(input_ids=IDS[:1, :1], past_key_values=cache)
            with Count() as count:
                model(input_ids=IDS[:1, :1], past_key_values=cache)
        return count.calls

    extra = calls(latent_model()) - calls(tiny("llama"))
    assert 0 < extra <= 2 * 90  # two layers; it was 152 each
