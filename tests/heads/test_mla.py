"""Multi-head latent attention in transformers' own class: exact where nothing is left out, plain
checkpoints that a fresh process loads, biases, every rule of positions, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.heads.mla import rotary
from effattn.hf import anatomy
from effattn.hf.verify import verify_plain

IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 96, (1536,), generator=torch.Generator().manual_seed(2))


def parent(**changes):
    """A random model of two layers, 8 query heads of 8."""
    return tiny("llama", **{"num_key_value_heads": 2, **changes})


@torch.no_grad()
def logits(model, **given):
    return model(input_ids=IDS, **given).logits


def difference(one, other) -> float:
    one, other = logits(one, use_cache=False).double(), logits(other, use_cache=False).double()
    return float((one - other).norm() / one.norm())


def randomised(model):
    """With biases of keys, values and outputs that are not 0, and queries' that are."""
    generator = torch.Generator().manual_seed(5)
    for layer in anatomy.of(model):
        for projection in (layer.k, layer.v, layer.o):
            with torch.no_grad():
                projection.module.bias.normal_(generator=generator)
        with torch.no_grad():
            layer.q.module.bias.zero_()
    return model


@pytest.mark.parametrize("refit", [False, True])
def test_full_rank_with_every_dimension_turning_is_the_model(refit):
    """But for the norm's and the model's own rounding in fp32."""
    model = parent()
    before = copy.deepcopy(model.state_dict())
    new, report = effattn.convert_mla(model, TOKENS, rank=33, rope_dim=16, refit=refit)
    assert type(new).__name__ == "DeepseekV3ForCausalLM"
    assert difference(model, new) < 1e-5
    assert all(torch.equal(model.state_dict()[name], held) for name, held in before.items())
    assert report.data["kv_bytes_per_token"] == {"before": 2 * 32 * 8, "after": 2 * 49 * 8}
    # what remains of the norm, by layer
    assert all(0 < row["norm_remains"] < 1e-8 for row in report.data["layers"])


def test_biases_go_with_the_constant():
    model = randomised(parent(attention_bias=True))
    new, _ = effattn.convert_mla(model, TOKENS, rank=33, rope_dim=16)
    assert difference(model, new) < 1e-5


@pytest.mark.parametrize(
    "rule",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_rules_of_positions_stay(rule):
    model = parent(rope_parameters={"rope_theta": 1e4, **rule})
    new, _ = effattn.convert_mla(model, TOKENS, rank=33, rope_dim=16)
    assert difference(model, new) < 1e-5


def test_steps_are_prefill_and_the_cache_is_small():
    new, _ = effattn.convert_mla(parent(), TOKENS, rank=12, rope_dim=8)
    whole = logits(new, use_cache=False)
    with torch.no_grad():
        first = new(input_ids=IDS[:, :30], use_cache=True)
        cache = first.past_key_values
        rest = [new(input_ids=one, past_key_values=cache).logits for one in IDS[:, 30:].split(1, 1)]
    torch.testing.assert_close(torch.cat([first.logits, *rest], dim=1), whole, rtol=1e-5, atol=1e-5)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 2 * 2 * 40 * (12 + 8) * 8  # layers, rows, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norms_effect_is_below_the_dtypes(dtype):
    """What remains of `kv_a_layernorm` is no more than a dtype's own rounding."""
    model = parent()
    exact = logits(model, use_cache=False).double()
    low = copy.deepcopy(model).to(dtype)
    new, _ = effattn.convert_mla(low, TOKENS, rank=33, rope_dim=16, refit=False)
    assert new.dtype == dtype
    error, plain = ((logits(one, use_cache=False).double() - exact).norm() for one in (new, low))
    assert error < 3 * plain + 1e-5 * exact.norm()


def test_a_plain_checkpoint_that_a_fresh_process_loads(tmp_path):
    new, _ = effattn.convert_mla(
        parent(dtype=torch.float32),
        TOKENS,
        rank=12,
        rope_dim=8,
    )
    new.save_pretrained(tmp_path / "out")
    facts = verify_plain(tmp_path / "out", new, IDS[0])
    assert facts["class"] == "DeepseekV3ForCausalLM"
    assert facts["cache_shape"] == [1, 1, 40, 12]


def test_more_numbers_lose_less():
    """Calibration errors of both layers, by the rank and by the dimensions that turn."""

    def errors(**sizes) -> list[float]:
        _, report = effattn.convert_mla(model, TOKENS, **sizes)
        for row in report.data["layers"]:
            assert row["attention_error"] <= row["attention_error_merged"] + 1e-12
        return [row["attention_error"] for row in report.data["layers"]]

    model = parent()
    turning = [errors(rank=33, rope_dim=size)[0] for size in (4, 8, 16)]
    ranks = [errors(rank=size, rope_dim=16)[0] for size in (5, 13, 33)]
    for found in (turning, ranks):
        assert found[0] > found[1] > found[2]
    assert turning[2] < 1e-8


def test_what_turns_is_a_matter_of_the_weights_not_of_their_gauge():
    """Heads mixed by any complex number a frequency compute the same, and convert to the same."""
    model, other = parent(), parent()
    generator = torch.Generator().manual_seed(3)
    for layer in anatomy.of(other):
        real, imaginary = layer.rotary_pairs()
        c = torch.randn(2, 4, 1, generator=generator, dtype=torch.complex128) + 1.5
        with torch.no_grad():
            for projection, by, heads in ((layer.k, c, 2), (layer.q, 1 / c.conj(), 8)):
                rows = projection.module.weight.view(heads, 8, -1)
                z = torch.complex(rows[:, real], rows[:, imaginary])
                z = z * by.repeat_interleave(heads // 2, dim=0)
                rows[:, real], rows[:, imaginary] = z.real, z.imag
    assert difference(model, other) < 1e-6
    given = dict(rank=33, rope_dim=8)
    one, two = (effattn.convert_mla(each, TOKENS, **given)[0] for each in (model, other))
    assert difference(one, two) < 1e-5


def test_dimensions_that_are_valid():
    assert list(rotary.valid(4, 3)) == [2, 4, 8, 16, 24]
    assert rotary.valid(4, 3)[24] == rotary.Kept(1, 3)
    assert rotary.valid(4, 3)[4] == rotary.Kept(2, 1)
    assert rotary.valid(6, 1)[4] == rotary.Kept(3, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rank": 1}, "rank: got 1, valid is 2 to 33"),
        ({"rank": 34}, "rank: got 34, valid is 2 to 33"),
        ({"rank": 8.0}, "rank: got 8.0"),
        ({"rank": 8, "rope_dim": 7}, r"rope_dim: got 7 \(nearest: 8\), valid are 2, 4, 8, 16"),
        ({"rank": 8, "rope_dim": "8"}, "rope_dim: got '8', valid are"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        effattn.convert_mla(parent(), TOKENS, **sizes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen2", {}, "its model_type is 'qwen2', valid are 'llama' and 'mistral'"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("mistral", {"sliding_window": 8}, "has a window of 8 tokens"),
    ],
)
def test_models_that_the_class_cannot_hold_are_refused(kind, changes, message):
    with pytest.raises(Unsupported, match=message):
        effattn.convert_mla(tiny(kind, **changes), TOKENS, rank=8)


def test_biases_of_queries_are_refused():
    model = randomised(tiny("llama", attention_bias=True))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.bias.fill_(0.1)
    with pytest.raises(Unsupported, match="layer 1 has a bias in its queries"):
        effattn.convert_mla(model, TOKENS, rank=8)


def test_a_swap_says_where_it_is():
    with pytest.raises(Unsupported, match=r"effattn\.convert_mla"):
        effattn.swap(parent(), heads="mla(rank=8)", calibration=TOKENS)
