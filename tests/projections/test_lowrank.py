"""LowRankLinear, the budget that several share, and models whose projections are of low rank."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from conftest import tiny
from torch import nn

import effattn
from effattn.damping import DAMPING
from effattn.errors import Unsupported
from effattn.projections import LowRankLinear, errors
from effattn.projections.budget import Spectrum, ranks
from effattn.projections.lowrank import closest
from effattn.surgery.replace import matrices_of

IDS = torch.randint(
    1,
    96,
    (2, 12),
    generator=torch.Generator().manual_seed(0),
)


def inputs(width, massive=None):
    """(500, width) of correlated fp64 inputs; one of them, on demand, a thousand times larger."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(
        500,
        width,
        generator=g,
        dtype=torch.float64,
    )
    x = x @ torch.randn(
        width,
        width,
        generator=g,
        dtype=torch.float64,
    )
    if massive is not None:
        x[:, massive] *= 1000
    return x


def missed(layer, linear, x):
    y = linear(x) - linear.bias
    return ((layer(x) - layer.bias - y).norm() / y.norm()).item()


# ---- one layer


@pytest.mark.parametrize(
    ("width", "rows", "rank"),
    [(24, 40, 3), (40, 24, 24), (7, 7, 1)],
)
def test_a_weight_of_that_rank_comes_back(width, rows, rank):
    torch.manual_seed(0)
    linear = nn.Linear(width, rows, dtype=torch.float64)
    linear.weight.data = (
        torch.randn(rows, rank).double()
        @ torch.randn(
            rank,
            width,
        ).double()
    )
    x = inputs(width)
    for moment in (None, x.T @ x / len(x)):
        layer = LowRankLinear.from_linear(linear, rank, moment=moment)
        assert torch.allclose(
            layer(x),
            linear(x),
            atol=1e-9,
        )
        assert layer.error < 1e-12
        assert torch.equal(layer.bias, linear.bias)
        assert torch.allclose(
            layer.to_linear().weight,
            linear.weight,
            atol=1e-11,
        )
        norms = layer.right.norm(dim=1), layer.left.norm(dim=0)  # shared evenly
        assert torch.allclose(*norms)


def test_every_rank_is_the_best_there_is():
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, dtype=torch.float64)
    values = torch.linalg.svdvals(linear.weight)
    for rank in (1, 5, 23, 24):
        layer = LowRankLinear.from_linear(linear, rank)
        best = (values[rank:].square().sum() / values.square().sum()).sqrt().item()
        assert math.isclose(
            layer.error,
            best,
            rel_tol=1e-9,
            abs_tol=1e-13,
        )
        assert layer.output_error is None


def test_closest_outputs_are_those_of_the_whitened_weight():
    torch.manual_seed(0)
    linear, x = (
        nn.Linear(
            20,
            30,
            dtype=torch.float64,
        ),
        inputs(20),
    )
    moment = x.T @ x / len(x)
    plain = LowRankLinear.from_linear(linear, 4)
    fitted = LowRankLinear.from_linear(linear, 4, moment=moment)
    assert missed(
        fitted,
        linear,
        x,
    ) < 0.8 * missed(plain, linear, x)
    assert math.isclose(
        fitted.output_error,
        missed(fitted, linear, x),
        rel_tol=1e-6,
    )
    # the textbook: W L truncated, L taken off again
    lower = torch.linalg.cholesky(moment + DAMPING * moment.diagonal().diag())
    u, values, v = torch.linalg.svd(linear.weight @ lower)
    expected = u[:, :4] * values[:4] @ v[:4] @ torch.linalg.inv(lower)
    assert torch.allclose(fitted.dense(), expected, atol=1e-9)


def test_a_massive_input_does_not_drown_the_others():
    """Scaling an input and its column the other way changes neither the outputs nor the fit."""
    torch.manual_seed(0)
    linear, x = (
        nn.Linear(
            16,
            16,
            dtype=torch.float64,
        ),
        inputs(16),
    )
    scaled, massive = (
        copy.deepcopy(linear),
        inputs(
            16,
            massive=3,
        ),
    )
    scaled.weight.data[:, 3] /= 1000
    fits = [
        LowRankLinear.from_linear(
            one,
            4,
            moment=y.T @ y / len(y),
        )
        for one, y in ((linear, x), (scaled, massive))
    ]
    assert math.isclose(
        missed(fits[0], linear, x),
        missed(fits[1], scaled, massive),
        rel_tol=1e-6,
    )
    dead = torch.zeros(16, 16)  # no inputs at all: the closest weight
    assert torch.allclose(
        LowRankLinear.from_linear(linear, 4, moment=dead).dense(),
        LowRankLinear.from_linear(linear, 4).dense(),
    )


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16],
)
def test_dtype_and_flags_are_the_linears(dtype):
    linear = nn.Linear(
        32,
        48,
        dtype=dtype,
    ).eval()
    linear.weight.requires_grad_(False)
    layer = LowRankLinear.from_linear(linear, 32)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert [p.requires_grad for p in (layer.right, layer.left, layer.bias)] == [False, False, True]
    x = torch.randn(5, 32).to(dtype)
    tolerance = 20 * torch.finfo(dtype).eps * linear(x).float().abs().max()
    assert (layer(x).float() - linear(x).float()).abs().max() < tolerance
    assert layer.to_linear().weight.dtype == dtype
    assert not layer.training


def test_gradients_sizes_and_cost():
    torch.manual_seed(0)
    layer = LowRankLinear(12, 18, 5, dtype=torch.float64)
    names = list(layer.state_dict())
    assert names == ["right", "left", "bias"]

    def call(x, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, given, (x,))

    x = torch.randn(
        4,
        12,
        dtype=torch.float64,
        requires_grad=True,
    )
    assert torch.autograd.gradcheck(
        call,
        (x, *layer.parameters()),
    )
    assert layer.weight_parameters == 5 * 30
    assert layer.nbytes == 8 * (150 + 18)
    cost, back = (
        layer.cost(3),
        layer.cost(
            3,
            backward=True,
        ),
    )
    assert (cost.flops, cost.read_bytes, cost.write_bytes) == (900, 8 * (36 + 168), 8 * 54)
    assert back.flops == 2 * 900 + 2 * 3 * 60
    assert LowRankLinear(12, 18, 5, bias=False).bias is None
    wide = LowRankLinear(
        256,
        256,
        64,
    )(torch.randn(200, 256))
    assert (
        0.8
        < wide.std()
        / nn.Linear(256, 256)(
            torch.randn(
                200,
                256,
            )
        ).std()
        < 1.25
    )


def test_a_ratio_of_one_layer_is_its_largest_rank_below():
    linear = nn.Linear(60, 40)
    assert LowRankLinear.from_linear(linear, ratio=0.5).rank == 12
    with pytest.raises(ValueError, match=r"ratio: got 0.01, rank 1 has 0.04167 of"):
        LowRankLinear.from_linear(linear, ratio=0.01)
    with pytest.raises(ValueError, match="rank: got 41, valid are 1 to 40"):
        LowRankLinear.from_linear(linear, 41)
    linear.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        LowRankLinear.from_linear(linear, 2)


# ---- the budget


def spectrum(rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(
        min(rows, columns),
        generator=g,
        dtype=torch.float64,
    ) ** (1 + seed % 4)
    return Spectrum(
        rows,
        columns,
        values.sort(descending=True).values,
    )


def lost(spectra, chosen):
    return sum(
        0.0 if rank is None else 1 - one.kept()[rank]
        for one, rank in zip(spectra, chosen, strict=True)
    )


def price(spectra, chosen):
    return sum(
        one.dense if rank is None else rank * (one.rows + one.columns)
        for one, rank in zip(spectra, chosen, strict=True)
    )


@pytest.mark.parametrize("seed", range(12))
def test_ranks_are_those_of_trying_all(seed):
    shapes = [(6, 5), (4, 9), (3, 8)]
    spectra = [
        spectrum(
            *shape,
            seed * 3 + place,
        )
        for place, shape in enumerate(shapes)
    ]
    every = itertools.product(
        *(
            [
                *range(
                    1,
                    one.most + 1,
                ),
                None,
            ]
            for one in spectra
        )
    )
    tried = sorted(
        (
            price(
                spectra,
                each,
            ),
            lost(spectra, each),
        )
        for each in every
    )
    whole = sum(one.dense for one in spectra)
    for budget in range(
        tried[0][0],
        whole + 1,
        3,
    ):
        found = ranks(spectra, budget)
        spent = price(spectra, found)
        assert spent <= budget
        best = min(loss for cost, loss in tried if cost <= budget)
        # one purchase at most is missing: the best of a budget that is smaller by the dearest
        dearest = max(one.dense for one in spectra)
        assert lost(spectra, found) >= best - 1e-12
        below = [loss for cost, loss in tried if cost <= budget - dearest]
        assert not below or lost(spectra, found) <= min(below) + 1e-12
    assert ranks(spectra, whole) == [None, None, None]
    with pytest.raises(ValueError, match=f"which have {tried[0][0]} with rank 1 each"):
        ranks(spectra, tried[0][0] - 1)


def test_without_a_jump_to_dense_the_greedy_choice_is_the_best():
    """Equal prices and no dense weight in reach: nothing is missing at all."""
    spectra = [
        spectrum(
            8,
            8,
            seed,
        )
        for seed in (1, 2, 5)
    ]
    for budget in range(48, 16 * 7, 16):
        found = ranks(spectra, budget)
        tries = itertools.product(range(1, 4), repeat=3)
        best = min(
            lost(spectra, each)
            for each in tries
            if price(
                spectra,
                each,
            )
            <= budget
        )
        if None not in found:
            assert lost(spectra, found) == pytest.approx(
                best,
                abs=1e-12,
            )


def test_nothing_is_bought_for_a_weight_that_needs_no_more():
    flat = torch.tensor([1.0, 0.5, 0, 0, 0, 0, 0, 0])
    zero = Spectrum(8, 8, torch.zeros(8))
    assert ranks(
        [Spectrum(8, 8, flat), zero],
        128,
    ) == [2, 1]


# ---- a model


def dense_twin(model):
    """A copy with every replaced layer multiplied out by itself."""
    twin = copy.deepcopy(model)
    for name, layer in matrices_of(twin).items():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, layer.to_linear())
    return twin


@pytest.mark.parametrize(
    "kind",
    ["llama", "qwen3", "phi3", "gpt_neox", "opt"],
)
def test_logits_are_those_of_the_dense_equivalents(kind, tmp_path):
    model = tiny(kind)
    others = {n: p.clone() for n, p in model.named_parameters()}
    spec = "lowrank(ratio=0.5, ffn=True, method='svd')"
    assert effattn.swap(model, projections=spec) is model
    assert all(
        torch.equal(
            p,
            others[n],
        )
        for n, p in model.named_parameters()
        if n in others
    )
    logits = model(IDS).logits
    assert torch.allclose(
        logits,
        dense_twin(model)(IDS).logits,
        atol=1e-5,
    )
    found = errors(model)
    assert [each["matrix"] for each in found] == list(matrices_of(model))
    assert all(each["parameters"] < each["dense_parameters"] for each in found)
    loaded = effattn.load(effattn.save(model, tmp_path / "out"))
    assert type(loaded) is type(model)
    assert torch.equal(loaded(IDS).logits, logits)
    assert errors(loaded) == found
    assert spec in effattn.describe(loaded).layers[0]["projections"]
    effattn.swap(model, projections="dense")
    assert not matrices_of(model)
    assert torch.allclose(
        model(IDS).logits,
        logits,
        atol=1e-5,
    )


def test_one_budget_for_all_matrices_of_a_spec():
    model, _ = effattn.embedded.load()
    dense = sum(p.numel() for n, p in model.named_parameters() if "_proj.weight" in n)
    tokens = effattn.embedded.tokens("train", 4096)
    spec = "lowrank(ratio=0.6, ffn=True)"
    effattn.swap(
        model,
        projections={"0": "lowrank(rank=100)", "1-": spec},
        calibration=tokens,
    )
    found = errors(model)
    first = [each for each in found if ".0." in each["matrix"]]
    rest = [each for each in found if ".0." not in each["matrix"]]
    assert [each["rank"] for each in first] == [100] * 4
    assert len({each["rank"] for each in rest}) > 10
    kept = dense * 3 / 4 - sum(each["dense_parameters"] - each["parameters"] for each in rest)
    assert 0.599 < kept / (dense * 3 / 4) <= 0.6
    assert all(0 < each["output_error"] < 1 for each in found)


def test_half_of_the_parameters_of_the_embedded_model():
    tokens = effattn.embedded.tokens("train", 4096)
    held_out = effattn.embedded.tokens("validation", 2048)
    found = {}
    for method in ("dense", "data", "svd"):
        model, _ = effattn.embedded.load()
        if method != "dense":
            spec = f"lowrank(ratio=0.5, method={method!r})"
            effattn.swap(model, projections=spec, calibration=tokens)
        found[method] = math.log(
            effattn.perplexity(
                model,
                held_out,
                context=512,
            )
        )
    assert found["data"] - found["dense"] < 0.04
    assert found["data"] < found["svd"] - 0.005


def test_layers_of_one_spec_share_and_others_do_not():
    model = tiny("llama")
    for weight in model.model.layers[1].self_attn.parameters():  # nothing there to be kept
        nn.init.zeros_(weight)
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = 1.0
    effattn.swap(model, projections="lowrank(ratio=0.6, method='svd')")
    assert [e["rank"] for e in errors(model)] == [1] * 4
    assert all(".1." in e["matrix"] for e in errors(model))  # layer 0 could stay dense
    again = tiny("llama")
    specs = {"0": "lowrank(ratio=0.5, method='svd')", "1": "lowrank(ratio=0.4, method='svd')"}
    effattn.swap(again, projections=specs)
    assert len(matrices_of(again)) == 8


MISTAKES = [
    ("lowrank", "rank=None and ratio=None, valid is one of them, for example lowrank"),
    ("lowrank(rank=4, ratio=0.5)", "rank=4 and ratio=0.5, valid is one of them"),
    ("lowrank(ratio=1)", "ratio: got 1, valid are numbers between 0 and 1"),
    ("lowrank(ratio='half')", "ratio: got 'half'"),
    ("lowrank(ratio=0.01, method='svd')", r"q_proj: lowrank: ratio: got 0.01, rank 1 has 0.03125"),
    ("lowrank(rank=32, method='svd')", r"q_proj: lowrank: rank: got 32, valid are 1 to 31, which"),
    ("lowrank(rank=True, method='svd')", "rank: got True"),
    ("lowrank(ratio=0.5)", "calibration: got None"),
    ("lowrank(ratio=0.5, method='sdv')", "did you mean 'svd'"),
    ("lowrnk(ratio=0.5)", "did you mean 'lowrank'"),
    ("lowrank(ratios=0.5)", "did you mean 'ratio'"),
    ("lowrank(ratio=0.5, ffn=1)", "ffn: got 1, valid are True and False"),
]


@pytest.mark.parametrize(
    ("spec", "message"),
    MISTAKES,
    ids=str,
)
def test_mistakes_change_nothing(spec, message):
    model = tiny("llama")
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        effattn.swap(model, "sliding(window=4)", projections=spec)
    assert all(
        a is b
        for a, b in zip(
            model.modules(),
            modules,
            strict=True,
        )
    )


def test_heads_are_changed_first_and_not_afterwards(tokens):
    model = tiny("llama")
    effattn.swap(model, projections="lowrank(rank=8, method='svd')")
    with pytest.raises(Unsupported, match="has no weight by heads; change heads before"):
        effattn.convert_gqa(model, 2, tokens)
    both = tiny("llama")
    effattn.swap(
        both,
        heads="mqa",
        projections="lowrank(ratio=0.7)",
        calibration=tokens,
    )
    assert both.config.num_key_value_heads == 1
    assert torch.allclose(
        both(IDS).logits,
        dense_twin(both)(IDS).logits,
        atol=1e-5,
    )


def test_factors_of_a_weight_of_zeros_are_finite():
    assert all(
        torch.isfinite(factor).all()
        for factor in closest(
            torch.zeros(6, 5),
            3,
        )
    )
