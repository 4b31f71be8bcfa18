"""Structured pruning: criteria against their definitions, least squares, gates, and what is
refused.
"""

from __future__ import annotations

import pytest
import torch
from conftest import tiny

import effattn
from effattn.calibration.layerwise import watch, windows
from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.prune.structural import criteria
from effattn.prune.structural.compensation import compensate
from effattn.prune.structural.criteria import obs
from effattn.prune.structural.criteria.base import losses
from effattn.prune.structural.gates import gated
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.removal import structured
from effattn.prune.structural.slicing import slice_model

LENGTH = 32


@pytest.fixture
def model():
    return tiny("llama", num_key_value_heads=4)  # 8 query heads, 96 FFN dimensions, 2 layers, fp64


@pytest.fixture
def batches(tokens):
    return windows(tokens[: 6 * LENGTH], LENGTH, 2)


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[None, :48], use_cache=False).logits


def inputs_of(module, model, batches):
    seen = []
    with torch.no_grad(), watch(module, lambda x, _: seen.append(x)):
        for batch in batches:
            model(input_ids=batch)
    return torch.cat(seen)


# ---- criteria
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "phi3", "opt"])
def test_taylor_is_the_sum_of_weight_times_gradient_of_each_window(kind, tokens):
    model = (
        tiny(
            kind,
            num_key_value_heads=4,
            ffn_dim=96,
        )
        if kind != "opt"
        else tiny(kind, ffn_dim=96)
    )
    parts = hf.of(model)
    rows = windows(tokens[: 3 * LENGTH], LENGTH, 1)
    heads, ffn = torch.zeros(2, parts.kv_heads), torch.zeros(2, 96)
    for window in rows:
        model.zero_grad()
        losses(model, window).sum().backward()
        products = {
            parameter: (parameter * parameter.grad).detach() for parameter in model.parameters()
        }
        for layer in parts:
            total = torch.zeros(parts.kv_heads)
            for projection in (layer.q, layer.k, layer.v, layer.o):
                wg = products[projection.module.weight].sum(0 if projection.output else 1)
                if projection.module.bias is not None and not projection.output:
                    wg = wg + products[projection.module.bias]
                index = projection.rows(torch.arange(projection.heads)).view(parts.kv_heads, -1)
                total = total + wg[index].sum(1)
            heads[layer.index] += total.abs()
            feed_forward = layer.feed_forward
            total = products[feed_forward.output.weight].sum(0)
            for module in feed_forward.inputs:
                wg = products[module.weight].sum(1)
                wg = wg if module.bias is None else wg + products[module.bias]
                total = total + wg.view(-1, 96).sum(0)
            ffn[layer.index] += total.abs()
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = criteria.measure(
        "taylor",
        parts,
        windows(
            tokens[: 3 * LENGTH],
            LENGTH,
            3,
        ),
        ["heads", "ffn", "layers"],
    )
    torch.testing.assert_close(
        found.heads,
        heads.double(),
        rtol=1e-4,
        atol=1e-7,
    )
    torch.testing.assert_close(
        found.ffn,
        ffn.double(),
        rtol=1e-4,
        atol=1e-7,
    )
    assert found.layers.shape == (2,)
    assert wanted == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_gates_multiply_and_their_gradients_are_michels(model, batches, tokens):
    parts, before = hf.of(model), logits(model, tokens)
    ones = [torch.ones(8), torch.ones(8)]
    with gated(parts, ones, [torch.ones(96), None]):
        torch.testing.assert_close(logits(model, tokens), before)
    zero = [torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 1])] * 2  # both query heads of group 1
    keep = Keep(heads=[torch.tensor([0, 2, 3])] * 2)
    with gated(parts, zero):
        found = logits(model, tokens)
    torch.testing.assert_close(logits(model, tokens), before)  # the hooks are gone
    mistral = tiny("mistral", num_key_value_heads=4)
    mistral.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        logits(slice_model(mistral, keep), tokens),
        found,
        rtol=0,
        atol=1e-6,
    )

    step, expected = 1e-4, torch.zeros(2, 4)
    for window in batches[0]:
        for layer in range(2):
            for head in range(8):
                loss = []
                for sign in (1, -1):
                    gates = [torch.ones(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)]
                    gates[layer][head] += sign * step
                    with torch.no_grad(), gated(parts, gates):
                        loss.append(losses(model.double(), window[None]).item())
                expected[layer, head // 2] += abs(loss[0] - loss[1]) / (2 * step)
    expected /= expected.norm(dim=1, keepdim=True)
    found = criteria.measure(
        "michel",
        parts,
        batches[:1],
        ["heads", "ffn"],
    )
    torch.testing.assert_close(
        found.heads,
        expected.double(),
        rtol=0.05,
        atol=5e-3,
    )
    torch.testing.assert_close(found.ffn.norm(dim=1), torch.ones(2, dtype=torch.float64))
    few = [torch.ones(4)] * 2
    with (
        pytest.raises(ValueError, match=r"heads: got gates \(4,\), valid is \(8,\)"),
        gated(parts, few),
    ):
        pass
    with (
        pytest.raises(ValueError, match="ffn: got gates for 1 layers, the model has 2"),
        gated(parts, None, [None]),
    ):
        pass


def test_the_criteria_that_only_look(model, batches):
    parts = hf.of(model)
    layer = parts.layers[1]
    down = layer.feed_forward.output
    x, z = (
        inputs_of(
            module,
            model,
            batches,
        )
        for module in (down, layer.o.module)
    )
    w, o = down.weight.detach(), layer.o.module.weight.detach()
    wanted = {
        "flap": (
            x.var(0, unbiased=False) * w.square().sum(0),
            z.var(0, unbiased=False) * o.square().sum(0),
        ),
        "wanda_sum": ((w.abs() * x.norm(dim=0)).sum(0), (o.abs() * z.norm(dim=0)).sum(0)),
    }
    for name, (ffn, heads) in wanted.items():
        found = criteria.measure(name, parts, batches, ["heads", "ffn"])
        torch.testing.assert_close(found.ffn[1], ffn)
        torch.testing.assert_close(found.heads[1], heads.view(4, -1).sum(1))
    found = criteria.measure("activation", parts, batches, ["heads", "ffn"])
    per_window = (
        x.float()
        .view(
            6,
            LENGTH,
            96,
        )
        .abs()
        .mean(1)
    )
    torch.testing.assert_close(
        found.ffn[1],
        per_window.norm(dim=0).double(),
        rtol=1e-5,
        atol=1e-6,
    )
    per_window = (
        z.float()
        .view(
            6,
            LENGTH,
            8,
            8,
        )
        .norm(dim=-1)
        .mean(1)
    )
    torch.testing.assert_close(
        found.heads[1], per_window.norm(dim=0).view(4, 2).sum(1).double(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [1, 3])
def test_obs_removes_what_costs_least_once_the_rest_is_solved_again(size):
    """Against trying every structure in every round, with a least-squares solution for each."""
    torch.manual_seed(0)
    x = torch.randn(
        300,
        12,
        dtype=torch.float64,
    ) @ torch.randn(12, 12, dtype=torch.float64)
    weight, gram = (
        torch.randn(
            5,
            12,
            dtype=torch.float64,
        ),
        x.T @ x,
    )
    damped = gram + obs.DAMPING * gram.diagonal().diag()

    def error(gone: list[int]) -> float:
        kept = [i for i in range(12) if i // size not in gone]
        left = weight.clone()
        left[:, kept] -= weight @ damped[:, kept] @ torch.linalg.inv(damped[kept][:, kept])
        return float((left @ damped * left).sum())

    order: list[int] = []
    while len(order) < 12 // size:
        order.append(min(set(range(12 // size)) - set(order), key=lambda one: error([*order, one])))
    assert obs.removal_order(gram, weight, size).tolist() == order


def test_obs_keeps_one_of_two_that_say_the_same(model, batches):
    """Every FFN dimension twice: a copy of each may go and nothing is lost, which no score of
    single ones can see.
    """
    parts = hf.of(model)
    for layer in parts:
        for module in layer.feed_forward.inputs:
            module.weight.data[48:] = module.weight.data[:48]
    found = criteria.measure("obs", parts, batches, ["heads", "ffn"])
    assert sorted(found.heads[0].tolist()) == [0, 1, 2, 3]
    for row in found.ffn:
        kept = row.sort(descending=True).indices[:48] % 48
        assert len(set(kept.tolist())) == 48


def test_obs_takes_several_a_round_where_there_are_many(monkeypatch):
    monkeypatch.setattr(obs, "ROUNDS", 10)
    x, weight = (
        torch.randn(
            100,
            96,
            dtype=torch.float64,
        ),
        torch.rand(5, 96, dtype=torch.float64),
    )
    weight[:, :48] /= 1e3
    order = obs.removal_order(x.T @ x, weight).tolist()
    assert sorted(order) == list(range(96))
    assert sorted(order[:48]) == list(range(48))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("rounds", [10, 256])
def test_obs_orders_no_more_than_are_removed(size, rounds, monkeypatch):
    """The same order for those; the others follow, by what each would cost next."""
    monkeypatch.setattr(obs, "ROUNDS", rounds)
    draw = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(
            n,
            96,
            dtype=torch.float64,
            generator=draw,
        )
        for n in (200, 5)
    )
    gram, count = x.T @ x, 96 // size
    whole = obs.removal_order(gram, weight, size).tolist()
    for removed in (0, 1, 7, count // 4, count):
        order = obs.removal_order(gram, weight, size, removed).tolist()
        assert order[:removed] == whole[:removed]
        assert sorted(order) == list(range(count))


def test_a_pruning_asks_obs_for_what_it_removes(model, tokens, monkeypatch):
    asked, order = [], obs.removal_order
    monkeypatch.setattr(
        obs, "removal_order", lambda *given: asked.append(given[2:]) or order(*given)
    )
    structured(
        model,
        tokens,
        heads=2,
        ffn=0.25,
        criterion="obs",
        length=LENGTH,
    )
    assert sorted(set(asked)) == [(1, 24), (16, 2)]
    assert len(asked) == 4


def test_block_influence_and_random(model, batches):
    parts, seen = hf.of(model), []
    with torch.no_grad():
        for batch in batches:
            seen.append(model(input_ids=batch, output_hidden_states=True).hidden_states)
    first, second = (torch.cat([states[i] for states in seen]) for i in (0, 1))
    wanted = (
        1
        - torch.cosine_similarity(
            first,
            second,
            dim=-1,
        ).mean()
    )
    found = criteria.measure("block_influence", parts, batches, ["layers"])
    torch.testing.assert_close(found.layers[0], wanted.double())
    shuffled = [
        criteria.measure(
            "random",
            parts,
            batches,
            seed=seed,
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(shuffled[0].ffn, shuffled[1].ffn)
    assert not torch.equal(shuffled[0].ffn, shuffled[2].ffn)
    with pytest.raises(
        Unsupported, match="'flap' does not rank layers; 'taylor', 'block_influence', 'random' do"
    ):
        criteria.measure("flap", parts, batches, ["layers"])
    with pytest.raises(ValueError, match="did you mean 'taylor'"):
        criteria.measure("tailor", parts, batches)


# ---- least squares
# -------------------------------------------------------------------------------------------------


def test_compensation_is_least_squares_on_the_whole_layers_output(model, tokens):
    """W' = W C[:, S] C[S, S]^-1, for the first layer by numpy's way; later ones on what the pruned
    model computes.
    """
    parts, batches = hf.of(model), windows(tokens, 64, 4)
    kept = torch.arange(0, 96, 2)
    keep = Keep(ffn=[kept, kept])
    small = slice_model(model, keep)
    down = hf.of(small).layers[0].feed_forward.output
    x = inputs_of(parts.layers[0].feed_forward.output, model, batches)
    target = x @ parts.layers[0].feed_forward.output.weight.detach().T
    wanted = torch.linalg.lstsq(x[:, kept], target).solution.T
    rows = compensate(parts, hf.of(small), keep, batches)

    def error(weight) -> float:
        return float((x[:, kept] @ weight.T - target).square().sum() / target.square().sum())

    assert rows[0]["ffn_error"] == pytest.approx(error(down.weight.detach()), rel=1e-6)
    assert error(wanted) <= rows[0]["ffn_error"] < 1.001 * error(wanted)
    assert all(row["ffn_error"] < 0.9 * row["ffn_error_sliced"] for row in rows)
    assert all(row["heads_error"] is None for row in rows)


def test_biases_take_the_mean_of_what_went(tokens):
    """FLAP's correction: with biases alone, each one is W[:, gone] E[x[gone]]."""
    model = tiny("llama")
    small, report = structured(
        model, tokens, ffn=48, criterion="flap", compensate=False, bias=True, length=64
    )
    assert small.config.mlp_bias
    kept = report.data["kept"]["ffn"][0]
    gone = [i for i in range(96) if i not in kept]
    down = hf.of(model).layers[0].feed_forward.output
    x = inputs_of(down, model, windows(tokens, 64, 8))
    found = hf.of(small).layers[0].feed_forward
    torch.testing.assert_close(
        found.output.bias.detach(), (down.weight[:, gone] @ x.mean(0)[gone]).detach()
    )
    assert torch.equal(found.output.weight, down.weight[:, kept])
    assert not any(module.bias.any() for module in found.inputs)
    assert all(row["ffn_error"] <= row["ffn_error_sliced"] for row in report.layers)
    with pytest.raises(
        Unsupported, match=r"MistralForCausalLM cannot have a bias in o_proj.*attention_bias"
    ):
        structured(
            tiny("mistral"),
            tokens,
            heads=4,
            bias=True,
            length=64,
        )


@pytest.mark.parametrize("kind", ["gemma2", "opt", "mixtral", "phi"])
def test_other_classes(kind, tokens):
    """Norms behind the output modules, an FFN in two modules with biases, experts, parallel
    residuals.
    """
    if kind == "mixtral":
        model, amounts = tiny(kind, dtype=torch.float32), {"heads": 4}
    else:
        model, amounts = (
            tiny(
                kind,
                dtype=torch.float32,
                **({"ffn_dim": 96} if kind == "opt" else {}),
            ),
            {"ffn": 0.5},
        )
    small, report = structured(model, tokens, **amounts, length=64)
    assert small.num_parameters() < model.num_parameters()
    target = next(iter(amounts))
    assert all(0 < row[f"{target}_error"] < row[f"{target}_error_sliced"] for row in report.layers)
    assert report.data["sizes"]["after"]["parameters"] == small.num_parameters()


# ---- the whole, on the model that means something
# -------------------------------------------------------------------


def test_the_embedded_model_loses_less_with_taylor_and_with_least_squares():
    model, _ = effattn.embedded.load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, held_out = (
        effattn.embedded.tokens("train", 5376),
        effattn.embedded.tokens("validation", 1281),
    )
    whole = effattn.perplexity(model, held_out, 256)
    found = {}
    for criterion, solved in (("taylor", False), ("taylor", True), ("random", False)):
        small, report = effattn.prune.structured(
            model, train, heads=4, ffn=0.25, criterion=criterion, compensate=solved, length=256
        )
        assert (small.config.num_attention_heads, small.config.intermediate_size) == (4, 528)
        found[criterion, solved] = effattn.perplexity(small, held_out, 256)
    assert whole < found["taylor", True] < found["taylor", False] < found["random", False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (
        report.data["sizes"]["after"]["kv_bytes_per_token"] * 2
        == report.data["sizes"]["before"]["kv_bytes_per_token"]
    )


def test_it_composes_with_gqa_a_pattern_and_decoding(tokens):
    model = tiny("llama")
    effattn.convert_gqa(model, 4, tokens, length=64)
    small, _ = structured(
        model,
        tokens,
        heads=2,
        ffn=0.5,
        layers=1,
        criterion={"heads": "activation", "ffn": "wanda_sum", "layers": "block_influence"},
        length=64,
    )
    assert effattn.describe(small).layers[0]["heads"] == "gqa(kv_heads=2)"
    effattn.swap(small, "sliding(window=16, sinks=2)")
    with pytest.raises(Unsupported, match="is swapped"):
        structured(small, tokens, ffn=0.5, length=64)
    out = small.generate(
        tokens[None, :40],
        min_new_tokens=24,
        max_new_tokens=24,
        do_sample=False,
    )
    assert out.shape == (1, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "heads, ffn, layers: got None, None, None, which removes nothing"),
        ({"heads": 8}, "got 8, None, None, which removes nothing"),
        (
            {"heads": 6},
            r"heads: got 6 to keep, LlamaForCausalLM \(hidden size 64, 8 key/value heads\) it can "
            r"keep 1, 2, 4",
        ),
        (
            {"heads": 9},
            "heads: got 9, the model has 8 key/value heads a layer; valid is an int from 1 to 8",
        ),
        ({"ffn": True}, "ffn: got True, valid is an int from 1 to 96"),
        ({"ffn": 1.5}, r"ffn: got 1.5, .*a float between 0 and 1"),
        ({"layers": 0.9}, "layers: got 0.9, the model has 2 layers"),
        ({"ffn": 0.5, "criterion": "tailor"}, "criterion: got 'tailor' .did you mean 'taylor'"),
        ({"layers": 1, "criterion": "michel"}, "'michel' does not rank layers; 'taylor'"),
        ({"ffn": 48, "criterion": {"heads": "taylor"}}, "criterion: got none for ffn"),
        (
            {"ffn": 48, "tokens": torch.zeros(479, dtype=torch.int64)},
            "tokens: got 479, at least 480 are needed",
        ),
        (
            {"ffn": 48, "tokens": torch.zeros(63, dtype=torch.int64)},
            "tokens: got 63, less than a window of 64",
        ),
        ({"ffn": 48, "tokens": torch.zeros(700)}, "tokens: got torch.float32"),
        ({"ffn": 48, "tokens": torch.full((700,), 96)}, "vocabulary is 0 to 95"),
        ({"ffn": 48, "length": 4}, "length: got 4"),
    ],
)
def test_bad_arguments(arguments, message, tokens):
    with pytest.raises(ValueError, match=message):
        structured(tiny("llama"), **{"tokens": tokens, "length": 64, **arguments})


@pytest.mark.parametrize("criterion", ["taylor", "flap"])
def test_numbers_that_are_not_finite_name_the_place(criterion, tokens):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        structured(model, tokens, ffn=48, length=64)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e300
    model.model.layers[1].mlp.gate_proj.weight.data[0] = 1e300
    with pytest.raises(
        FloatingPointError, match="layer 1: the calibration activations contain NaN or infinity"
    ):
        structured(model, tokens, ffn=48, criterion=criterion, length=64)


# ---- layers that differ
# -------------------------------------------------------------------------------------------------


def test_the_best_of_all_layers_stay(model, tokens):
    """As many on average, every layer its own best, and nothing else by the scores."""
    small, report = structured(model, tokens[:2048], heads=2, ffn=64, uniform=False, length=LENGTH)
    kept, importance = report.data["kept"], report.data["importance"]
    assert sum(map(len, kept["heads"])) == 4
    scores = torch.tensor(importance["heads"])
    order = scores.flatten().sort(descending=True).indices[:4].tolist()
    assert sorted(order) == [4 * i + j for i, row in enumerate(kept["heads"]) for j in row]
    assert sum(map(len, kept["ffn"])) == 128
    assert all(len(row) % 32 == 0 for row in kept["ffn"])
    assert [layer.kv_heads for layer in hf.of(small)] == [len(row) for row in kept["heads"]]
    assert report.data["sizes"]["after"]["kv_heads"] == 2
    assert torch.isfinite(logits(small, tokens)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn": 32, "criterion": "obs"}, "criterion: got 'obs' for ffn with uniform=False"),
        ({"heads": 9}, "the model has 4 key/value heads a layer"),
    ],
)
def test_layers_that_cannot_differ_so_are_refused(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        structured(model, tokens[:2048], uniform=False, **options)
