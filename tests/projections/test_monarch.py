"""MonarchLinear, and models whose projections are Monarch matrices: exact where they can be, else
refused; saved.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import tiny
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import effattn
from effattn.damping import DAMPING
from effattn.errors import Unsupported
from effattn.projections import MonarchLinear, errors
from effattn.projections.base import relative_error
from effattn.projections.monarch import sizes
from effattn.projections.project import project
from effattn.surgery.replace import matrices_of

IDS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(0))
#         inputs outputs blocks rank
SHAPES = [
    (64, 64, 8, 1),
    (60, 100, 7, 3),
    (96, 48, 4, 2),
    (33, 65, 5, 7),
    (5, 3, 1, 2),
]


def random_layer(inputs, outputs, blocks, rank, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return MonarchLinear(
        inputs,
        outputs,
        blocks,
        rank=rank,
        dtype=dtype,
        **options,
    )


# ---- one layer


@pytest.mark.parametrize("shape", SHAPES)
def test_the_projection_of_a_monarch_matrix_is_itself(shape):
    layer = random_layer(*shape)
    again = MonarchLinear.from_linear(
        layer.to_linear(),
        shape[2],
        rank=shape[3],
    )
    assert torch.allclose(again.dense(), layer.dense(), atol=1e-13)
    assert again.error < 1e-13
    third = MonarchLinear.from_linear(
        again.to_linear(),
        shape[2],
        rank=shape[3],
    )
    assert torch.allclose(third.dense(), again.dense(), atol=1e-13)
    x = torch.randn(2, 3, shape[0], dtype=torch.float64)
    assert torch.allclose(again(x), layer.to_linear()(x), atol=1e-12)
    assert torch.equal(again.bias, layer.bias)


@pytest.mark.parametrize(("inputs", "outputs", "blocks"), [(24, 40, 4), (25, 18, 4)])
def test_full_rank_is_exact_for_any_weight_and_every_rank_is_the_best(inputs, outputs, blocks):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, dtype=torch.float64)
    full = min(-(-inputs // blocks), -(-outputs // blocks))
    found = [
        MonarchLinear.from_linear(linear, blocks, rank=rank).error for rank in range(1, full + 1)
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1e-13 < found[-2]
    # Eckart-Young, block by block: row t·blocks + j, columns of block i
    weight = torch.zeros(
        blocks * -(-outputs // blocks), blocks * -(-inputs // blocks), dtype=torch.float64
    )
    weight[:outputs, :inputs] = linear.weight.detach()
    parts = [weight[j::blocks].chunk(blocks, 1)[i] for j in range(blocks) for i in range(blocks)]
    missed = (
        sum(torch.linalg.svdvals(part)[1:].square().sum() for part in parts).sqrt() / weight.norm()
    )
    assert math.isclose(found[0], missed.item(), rel_tol=1e-9)


def test_factors_share_the_singular_values():
    torch.manual_seed(0)
    right, left = project(torch.randn(32, 48), 4, 3)
    assert torch.allclose(
        right.view(4, 4, 3, 12).norm(dim=-1).transpose(0, 1), left.view(4, 8, 4, 3).norm(dim=1)
    )


def test_a_gaussian_matrix_keeps_a_sixteenth_of_its_parameters_and_loses_most():
    """The known numbers: 1024 x 1024, 32 blocks: 6.25 % of the parameters, relative error 0.94."""
    torch.manual_seed(0)
    linear = nn.Linear(1024, 1024, bias=False)
    nn.init.normal_(linear.weight)
    layer = MonarchLinear.from_linear(linear, 32)
    assert (layer.rank, sum(p.numel() for p in layer.parameters())) == (1, 1024 * 1024 // 16)
    assert 0.935 < layer.error < 0.945
    error = (layer.dense() - linear.weight).norm() / linear.weight.norm()
    assert math.isclose(layer.error, error.item(), rel_tol=1e-4)


def test_a_fit_to_data_is_closer_in_outputs():
    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(48, 30, dtype=torch.float64)
    x = torch.randn(500, 48, generator=g, dtype=torch.float64) @ torch.randn(
        48, 48, generator=g, dtype=torch.float64
    )
    moment = x.T @ x / len(x)

    def missed(layer):
        y = linear(x) - linear.bias
        return ((layer(x) - layer.bias - y).norm() / y.norm()).item()

    plain = MonarchLinear.from_linear(linear, 4, rank=2)
    fitted = MonarchLinear.from_linear(
        linear,
        4,
        rank=2,
        moment=moment,
    )
    assert missed(fitted) < 0.8 * missed(plain)
    assert math.isclose(fitted.output_error, missed(fitted), rel_tol=1e-3)
    assert plain.output_error is None
    assert plain.error < fitted.error
    # what is minimised: never up, sweep by sweep
    noisy = moment + DAMPING * moment.diagonal().diag()
    costs = []
    for sweeps in (0, 1, 2, 4, 8):
        right, left = project(linear.weight.detach(), 4, 2, moment, sweeps=sweeps)
        fitted.right.data, fitted.left.data = right, left
        costs.append(relative_error(linear.weight.detach(), fitted.dense().detach(), noisy))
    assert costs == sorted(costs, reverse=True)
    exact = random_layer(48, 32, 4, 2)
    assert (
        MonarchLinear.from_linear(exact.to_linear(), 4, rank=2, moment=moment).output_error < 1e-6
    )
    singular = torch.zeros(48, 48)  # no inputs at all: nothing to fit, and nothing breaks
    assert torch.isfinite(
        MonarchLinear.from_linear(linear, 4, rank=2, moment=singular).dense()
    ).all()


@pytest.mark.parametrize(("blocks", "rank", "apart"), [(1, 6, 1e-9), (4, 2, 0.1)])
def test_a_massive_input_does_not_drown_the_others(blocks, rank, apart):
    """Scaling an input and its column the other way changes nothing but where the sweeps begin."""
    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(24, 24, bias=False, dtype=torch.float64)
    x = torch.randn(500, 24, generator=g, dtype=torch.float64)
    x = x @ torch.randn(24, 24, generator=g, dtype=torch.float64)
    found = []
    for scale in (1.0, 1000.0):
        y, weight = x.clone(), linear.weight.detach().clone()
        y[:, 3] *= scale
        weight[:, 3] /= scale
        right, left = project(weight, blocks, rank, y.T @ y / len(y), sweeps=12)
        layer = random_layer(24, 24, blocks, rank)
        layer.right.data, layer.left.data = right, left
        missed = y @ (layer.dense().detach() - weight).T
        found.append((missed.norm() / (y @ weight.T).norm()).item())
    assert math.isclose(*found, rel_tol=apart)


def test_padding_is_visible_counted_and_stays_zero():
    layer = random_layer(60, 100, 7, 2)
    assert (layer.padded_in, layer.padded_out) == (63, 105)
    assert "padded_in=63, padded_out=105" in repr(layer)
    assert "padded" not in repr(random_layer(64, 64, 8, 1))
    assert layer.right.shape == (7, 14, 9)
    assert layer.left.shape == (7, 15, 14)
    assert layer.nbytes == (7 * 14 * 9 + 7 * 15 * 14 + 100) * 8
    fitted = MonarchLinear.from_linear(layer.to_linear(), 7, rank=2)
    assert fitted.right[6, :, 6:].abs().max() == 0  # inputs 60 to 62
    assert all(fitted.left[j, 14].abs().max() == 0 for j in range(2, 7))  # outputs 100 to 104
    fitted(torch.randn(3, 60, dtype=torch.float64)).sum().backward()
    assert fitted.right.grad[6, :, 6:].abs().max() == 0
    assert all(fitted.left.grad[j, 14].abs().max() == 0 for j in range(2, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_device_and_flags_are_the_linears(dtype):
    linear = nn.Linear(32, 48, dtype=dtype).eval()
    linear.weight.requires_grad_(False)
    layer = MonarchLinear.from_linear(linear, 4, rank=8)  # full rank
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert not layer.training
    assert [p.requires_grad for p in (layer.right, layer.left, layer.bias)] == [False, False, True]
    x = torch.randn(5, 32).to(dtype)
    assert layer(x).dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    assert (layer(x).float() - linear(x).float()).abs().max() < tolerance * linear(
        x
    ).float().abs().max()
    back = layer.to_linear()
    assert (back.weight.requires_grad, back.bias.requires_grad, back.training) == (
        False,
        True,
        False,
    )


def test_state_dict_copies_and_gradients():
    layer, other = random_layer(12, 18, 3, 2), MonarchLinear(12, 18, 3, rank=2, dtype=torch.float64)
    assert list(layer.state_dict()) == ["right", "left", "bias"]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.equal(other(x), layer(x))
    names = list(layer.state_dict())

    def call(x, *values):
        return torch.func.functional_call(
            layer,
            dict(zip(names, values, strict=True)),
            (x,),
        )

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))
    assert MonarchLinear(12, 18, 3, bias=False).bias is None


def test_a_new_layer_has_outputs_like_a_new_linear():
    torch.manual_seed(0)
    x = torch.randn(200, 256)
    ratio = MonarchLinear(256, 256, 8, rank=4)(x).std() / nn.Linear(256, 256)(x).std()
    assert 0.8 < ratio < 1.25


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, 1),
        ({"blocks": 4}, 4),
        ({"rank": 3}, 3),
        ({"ratio": 0.5}, 2),
        ({"ratio": 1}, 4),
        ({"ratio": 0.25}, 1),
    ],
)
def test_ranks(options, rank):
    found = sizes(64, 64, **{"blocks": 8, **options})
    assert found.rank == rank
    if "ratio" in options:
        assert (
            found.parameters <= options["ratio"] * 64 * 64 < found.parameters // rank * (rank + 1)
        )


MISTAKES = [
    (dict(blocks=0), "blocks: got 0, valid are 1 to 48"),
    (dict(blocks=49), "blocks: got 49, valid are 1 to 48"),
    (dict(blocks=2.0), "blocks: got 2.0"),
    (
        dict(blocks=7, pad=False),
        "7 does not divide a weight of 48 x 60; these do: 1, 2, 3, 4, 6, 12; or give pad=True",
    ),
    (dict(blocks=4, rank=0), "rank: got 0, valid are 1 to 12"),
    (dict(blocks=4, rank=13), "rank: got 13, valid are 1 to 12"),
    (dict(blocks=4, rank=2, ratio=0.5), "rank=2 and ratio=0.5 given, valid is one of them"),
    (dict(blocks=4, ratio=1.5), "ratio: got 1.5, valid are numbers above 0, up to 1"),
    (dict(blocks=12, ratio=0.1), "ratio: got 0.1, rank 1 has 0.45 of the parameters"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_sizes_that_cannot_be(options, message):
    for make in (
        lambda: MonarchLinear(60, 48, **options),
        lambda: MonarchLinear.from_linear(nn.Linear(60, 48), **options),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_weights_that_are_no_numbers_and_unknown_implementations():
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        MonarchLinear.from_linear(linear, 2)
    with pytest.raises(ValueError, match="impl: got 'cuda'"):
        MonarchLinear(8, 8, 2, impl="cuda")


def test_cost_counts_padding_and_both_passes():
    layer = random_layer(60, 100, 7, 2, torch.float32)
    weights = 7 * 14 * 9 + 7 * 15 * 14
    cost = layer.cost(3)
    assert (cost.flops, cost.read_bytes, cost.write_bytes) == (
        6 * weights,
        4 * (180 + weights + 100),
        4 * 300,
    )
    back = layer.cost(3, backward=True)
    assert back.flops == 2 * cost.flops + 6 * 7 * 14 * 9
    assert (back.read_bytes, back.write_bytes) == (
        4 * (180 + 300 + weights),
        4 * (180 + weights + 100),
    )


# ---- a model


def dense_twin(model):
    """A copy with every Monarch layer multiplied out by itself."""
    import copy

    twin = copy.deepcopy(model)
    for name, layer in matrices_of(twin).items():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, layer.to_linear())
    return twin


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3", "gpt_neox", "opt", "phi"])
def test_logits_are_those_of_the_dense_equivalents(kind, tmp_path):
    model = tiny(kind)
    before, others = model(IDS).logits, {n: p.clone() for n, p in model.named_parameters()}
    assert effattn.swap(model, projections="monarch(blocks=8, ratio=0.5, ffn=True)") is model
    changed = {
        name.rpartition(".")[0] for name in others.keys() - dict(model.named_parameters()).keys()
    }
    assert changed == matrices_of(model).keys()
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    logits = model(IDS).logits
    assert not torch.allclose(logits, before)
    # their norms compute in fp32
    assert torch.allclose(logits, dense_twin(model)(IDS).logits, atol=1e-5)
    found = errors(model)
    assert all(
        0.1 < each["error"] < 0.9 and each["parameters"] <= each["dense_parameters"] / 2
        for each in found
    )
    assert [each["matrix"] for each in found] == list(matrices_of(model))

    path = effattn.save(model, tmp_path / "out")
    loaded = effattn.load(path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(IDS).logits, logits)
    assert errors(loaded) == found
    assert effattn.describe(loaded) == effattn.describe(model)
    assert not loaded.training
    assert torch.equal(AutoModelForCausalLM.from_pretrained(path)(IDS).logits, logits)

    effattn.swap(loaded, projections="dense")  # plain again, with the same function
    assert not matrices_of(loaded)
    assert torch.allclose(loaded(IDS).logits, logits, atol=1e-5)
    effattn.save(loaded, tmp_path / "plain")
    assert "effattn" not in (tmp_path / "plain" / "config.json").read_text()
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(IDS).logits, loaded(IDS).logits
    )


def test_describe_says_what_was_asked_for():
    model = tiny("llama")
    dense = effattn.describe(model)
    assert dense.layers[0]["projections"] == "dense"
    effattn.swap(model, projections={"1": "monarch(blocks=8)"})
    described = effattn.describe(model)
    assert [layer["projections"] for layer in described.layers] == ["dense", "monarch(blocks=8)"]
    assert described.layers[1]["parameters"]["attention"] == 4 * 2 * 8 * 8 * 8
    assert described.parameters["total"] == sum(p.numel() for p in model.parameters())
    assert described.kv_bytes_per_token == dense.kv_bytes_per_token
    effattn.swap(model, projections={"0": "monarch(blocks=4,ratio=.5,ffn=True)"})
    assert (
        effattn.describe(model).layers[0]["projections"] == "monarch(blocks=4, ratio=0.5, ffn=True)"
    )
    effattn.swap(model, projections={"0": "monarch(blocks=8)"})
    assert effattn.describe(model).layers[0]["projections"] == (
        "monarch(blocks=8), ffn: monarch(blocks=4, ratio=0.5, ffn=True)"
    )


def test_projecting_again_with_the_same_sizes_changes_nothing():
    model = tiny("llama")
    effattn.swap(model, projections="monarch(blocks=4, rank=3)")
    first = {name: layer.dense() for name, layer in matrices_of(model).items()}
    effattn.swap(model, projections="monarch(blocks=4, rank=3)")
    assert all(
        torch.allclose(layer.dense(), first[name], atol=1e-13)
        for name, layer in matrices_of(model).items()
    )


def test_with_heads_patterns_restore_and_a_checkpoint_of_all(tokens, tmp_path):
    model = tiny("llama")
    spec = "sliding(window=5, sinks=2)"
    effattn.swap(
        model, spec, heads="gqa(kv_heads=2)", projections="monarch(blocks=16)", calibration=tokens
    )
    assert model.model.layers[0].self_attn.k_proj.out_features == 16
    logits, layer = model(IDS).logits, effattn.describe(model).layers[0]
    assert layer["projections"] == "monarch(blocks=16)"
    assert (layer["heads"], layer["pattern"]) == ("gqa(kv_heads=2)", spec)
    loaded = effattn.load(effattn.save(model, tmp_path / "out"))
    assert torch.equal(loaded(IDS).logits, logits)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["model_type"] == "effattn"
    assert saved["effattn"]["model_type"] == "llama"
    assert saved["effattn"]["pattern"] == {"0": spec, "1": spec}
    for each in (loaded, model):
        assert (
            effattn.describe(effattn.restore(each)).layers[0]["projections"] == "monarch(blocks=16)"
        )
        assert not torch.allclose(each(IDS).logits, logits)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(
        generated[:, :-1], dense_twin(model).generate(IDS, max_new_tokens=3, do_sample=False)
    )


def test_longformers_own_projections_are_monarch_too():
    model = tiny("llama")
    pattern = "longformer(window=4, global_tokens=[0])"
    effattn.swap(model, pattern, projections="monarch(blocks=8)")
    assert effattn.describe(model).layers[0]["projections"] == "monarch(blocks=8), global separate"
    before = model(IDS).logits
    assert torch.allclose(
        before, effattn.swap(dense_twin(effattn.restore(model)), pattern)(IDS).logits, atol=1e-5
    )
    effattn.swap(model, pattern)
    with pytest.raises(
        Unsupported, match=r"layer 0 has global projections .* pattern and projections in one call"
    ):
        effattn.swap(model, projections="monarch(blocks=4)")
    effattn.swap(model, pattern, projections="monarch(blocks=4)")


def test_a_fit_to_calibration_tokens(tokens):
    plain, fitted = tiny("llama"), tiny("llama")
    effattn.swap(plain, projections="monarch(blocks=8, rank=2, ffn=True)")
    effattn.swap(
        fitted, projections="monarch(blocks=8, rank=2, ffn=True, method='data')", calibration=tokens
    )
    for ours, theirs in zip(errors(fitted), errors(plain), strict=True):
        assert ours["matrix"] == theirs["matrix"]
        assert ours["error"] > theirs["error"]
        assert 0 < ours["output_error"] < 1
        assert theirs["output_error"] is None
    first, model = tiny("llama").model.layers[0], fitted.model
    x = first.input_layernorm(model.embed_tokens(tokens))  # nothing was projected before
    missed = [
        (each.model.layers[0].self_attn.q_proj(x) - first.self_attn.q_proj(x)).norm().item()
        for each in (fitted, plain)
    ]
    assert missed[0] < missed[1]
    share = missed[0] / first.self_attn.q_proj(x).norm().item()
    assert math.isclose(share, errors(fitted)[0]["output_error"], rel_tol=1e-3)


def test_encoders():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = BertForMaskedLM(config).double().eval()
    effattn.swap(model, projections="monarch(blocks=4, ratio=0.5, ffn=True)")
    assert len(matrices_of(model)) == 12
    assert torch.allclose(model(IDS).logits, dense_twin(model)(IDS).logits, atol=1e-12)


def test_encoders_are_saved(tmp_path):
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = BertForMaskedLM(config).eval()
    effattn.swap(model, projections="monarch(blocks=4)")
    loaded = effattn.load(effattn.save(model, tmp_path / "out"))
    assert type(loaded) is BertForMaskedLM
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_the_embedded_model(tmp_path):
    model, tokenizer = effattn.embedded.load()
    tokens = effattn.embedded.tokens("validation", 2048)
    before = effattn.perplexity(model, tokens, context=256)
    # the full rank of blocks of 16 x 16
    effattn.swap(model, projections="monarch(blocks=16, rank=16)")
    assert math.isclose(effattn.perplexity(model, tokens, context=256), before, rel_tol=1e-4)
    model, _ = effattn.embedded.load()
    effattn.swap(model, projections="monarch(blocks=16, ratio=0.5)", calibration=tokens)
    attention = sum(layer["parameters"]["attention"] for layer in effattn.describe(model).layers)
    assert attention == 4 * 4 * 256 * 256 // 2
    path = effattn.save(model, tmp_path / "out", tokenizer)
    loaded, again = effattn.surgery.checkpoint.load_model(path)
    assert torch.equal(loaded(tokens[None, :64]).logits, model(tokens[None, :64]).logits)
    assert again("import os").input_ids == tokenizer("import os").input_ids


SWAP_MISTAKES = [
    ("monarch", "blocks must be given, for example monarch"),
    ("monach(blocks=8)", "did you mean 'monarch'"),
    ("monarch(block=8)", "did you mean 'blocks'"),
    (
        "monarch(blocks=7)",
        r"q_proj: monarch: blocks: 7 does not divide .* these do: 1, 2, 4, 8, 16, 32, 64; or",
    ),
    ("monarch(blocks=64, ratio=0.5)", r"q_proj: monarch: ratio"),
    ("monarch(blocks=8, rank=99)", "rank: got 99, valid are 1 to 8"),
    ("monarch(blocks=8, ffn=1)", "ffn: got 1, valid are True and False"),
    ("monarch(blocks=8, method='sdv')", "did you mean 'svd'"),
    ("monarch(blocks=8, method='data')", "calibration: got None"),
    ("dense(blocks=8)", "dense takes no options"),
    ({"0-5": "monarch(blocks=8)"}, "projections: got layers '0-5'"),
    (
        {"0": "monarch(blocks=8)", "1": "monarch(blocks=200)"},
        r"layers.1.*blocks: got 200, valid are 1 to 64",
    ),
    ({}, "projections: got an empty dict"),
]


@pytest.mark.parametrize(("spec", "message"), SWAP_MISTAKES, ids=str)
def test_mistakes_change_nothing(spec, message):
    model = tiny("llama")
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        effattn.swap(model, "sliding(window=4)", projections=spec)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert effattn.describe(model).layers[0]["pattern"] == "dense"


def test_blocks_are_checked_against_the_heads_that_will_be(tokens):
    model = tiny("llama")
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"k_proj: monarch: blocks: got 32, valid are 1 to 8"):
        effattn.swap(model, heads="mqa", projections="monarch(blocks=32)", calibration=tokens)
    with pytest.raises(ValueError, match="calibration: got None"):
        effattn.swap(model, heads="mqa", projections="monarch(blocks=8)")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_padding_on_request():
    model = tiny("llama")
    effattn.swap(model, projections="monarch(blocks=7, pad=True)")
    assert model.model.layers[0].self_attn.q_proj.padded_in == 70
    assert torch.allclose(model(IDS).logits, dense_twin(model)(IDS).logits, atol=1e-5)


def test_heads_cannot_be_merged_afterwards(tokens):
    model = tiny("llama")
    effattn.swap(model, projections={"1": "monarch(blocks=8)"})
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        Unsupported, match=r"monarch\(blocks=8\) has no weight by heads; change heads before"
    ):
        effattn.convert_gqa(model, 2, tokens)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_quantized_weights_and_experts_are_refused():
    model = tiny("llama")
    linear = model.model.layers[1].self_attn.v_proj
    linear.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        Unsupported,
        match=r"layers.1.self_attn.v_proj is a Linear of torch.int8; a quantized weight",
    ):
        effattn.swap(model, projections="monarch(blocks=8)")
    assert not matrices_of(model)
    with pytest.raises(Unsupported, match=r"experts of layer 0 .* without ffn=True"):
        effattn.swap(tiny("mixtral"), projections="monarch(blocks=8, ffn=True)")
    effattn.swap(tiny("mixtral"), projections="monarch(blocks=8)")


def test_checkpoints_that_do_not_fit(tmp_path):
    model = tiny("llama")
    effattn.swap(model, projections="monarch(blocks=8)")
    path = effattn.save(model, tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    name = "model.layers.0.self_attn.q_proj"
    entry = config["effattn"]["projections"][name]
    for wrong, message in (
        (
            {name: entry},
            r"do not fit config.json, missing keys: .*layers.1.self_attn.q_proj.weight",
        ),
        ({**config["effattn"]["projections"], name: entry | {"rank": 2}}, "q_proj.left"),
        (
            {**config["effattn"]["projections"], "model.nothing": entry},
            "'model.nothing': .* does not fit the model",
        ),
        ({**config["effattn"]["projections"], name: {"blocks": 8}}, "does not fit the model"),
    ):
        config["effattn"]["projections"] = wrong
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises((ValueError, RuntimeError), match=message):
            effattn.load(path)
    config["effattn"]["model_type"] = "lama"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="did you mean 'llama'"):
        effattn.load(path)
