"""A budget as people write it, and plans accounted for to the byte."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from conftest import tiny

from effattn.errors import Unsupported
from effattn.fitting.accounting import Ledger, counted
from effattn.fitting.budget import Budget, amount_of
from effattn.fitting.building import finish, twin
from effattn.fitting.candidates import OFFERS, axes_of, candidates, go_together, visible
from effattn.fitting.catalog import Catalog
from effattn.fitting.groups import Space
from effattn.fitting.plan import AXES, LayerChoice, Plan
from effattn.fitting.search import every_uniform, uniform, within
from effattn.fitting.speed import mock
from effattn.hf import anatomy
from effattn.quant.formats import Format

CONTEXT, BATCH = 96, 3


@pytest.mark.parametrize(
    ("name", "given", "number"),
    [
        ("bytes", "6GiB", 6 * 2**30),
        ("bytes", "6 GB", 6 * 10**9),
        ("bytes", "1.5 MiB", 3 * 2**19),
        ("bytes", 4096, 4096),
        ("bytes", "4_096", 4096),
        ("bytes", "60%", 600),
        ("kv_bytes_per_token", "8KiB", 8192),
        ("weight_bytes", "12.5%", 125),
        ("parameters", "1.5B", 1_500_000_000),
        ("parameters", "100M", 100_000_000),
        ("tokens_per_s", "40", 40),
        ("tokens_per_s", "120%", 1200),
    ],
)
def test_amounts(name, given, number):
    assert amount_of(name, given, 1000) == number


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bytes": "6 gigs"}, "bytes: unit: got 'gigs'"),
        ({"bytes": "6Gib"}, "did you mean 'GiB'|nearest"),
        ({"bytes": "six"}, "bytes: got 'six', valid is a positive number of bytes"),
        ({"bytes": -1}, "bytes: got -1"),
        ({"bytes": "0%"}, "bytes: got '0%'"),
        ({"bytes": True}, "bytes: got True"),
        ({"bytes": float("nan")}, "bytes: got nan"),
        ({"parameters": "3GiB"}, "parameters: unit: got 'GiB'"),
        ({"tokens_per_s": "40k"}, "tokens_per_s: unit: got 'k'"),
        ({}, "budget: got no limit"),
        ({"bytes": "50%", "context": 0}, "context: got 0"),
        ({"bytes": "50%", "batch": 1.5}, "batch: got 1.5"),
    ],
)
def test_bad_amounts(given, said):
    with pytest.raises(ValueError, match=said):
        Budget(**given)


def test_a_budget_that_the_parent_meets():
    budget = Budget(bytes="100%", parameters=2000)
    with pytest.raises(ValueError, match="nothing to do"):
        budget.limits({"bytes": 10.0, "parameters": 1000.0})
    limits = Budget(bytes="50%", parameters=2000).limits({"bytes": 10.0, "parameters": 1000.0})
    assert limits == {"bytes": 5, "parameters": 2000}
    with pytest.raises(ValueError, match="nothing to do"):
        Budget(tokens_per_s=5).limits({"tokens_per_s": 6.0})
    assert Budget(tokens_per_s=7).limits({"tokens_per_s": 6.0}) == {"tokens_per_s": 7}


def plans(parts: anatomy.Anatomy, count: int = 1) -> dict[str, Plan]:
    """Some candidates of each field in the first layer alone, and a plan of many."""
    ladders = candidates(parts, axes_of(None), 128)
    parent = Plan.of(parts)
    found = {
        f"{name} {value}": parent.with_field(name, value, [0])
        for name, values in ladders[0].items()
        for value in values[-count:]  # the smallest
    }
    # one of each form of weights, and what is left out of the last layer
    forms = [one for one in ladders[1].get("ffn_weights", []) if "(" in one or ":" in one]
    for form in forms:
        for name in ("attention_weights", "ffn_weights"):
            found[f"{name} {form}"] = parent.with_field(name, form, [1])
    for name in ("kv_heads", "ffn"):
        if 0 in ladders[1].get(name, []):
            found[f"no {name}"] = parent.with_field(name, 0, [1])
    own = parent.layers[0]
    heads, width = ladders[0]["kv_heads"][0], ladders[0]["ffn"][0]
    found["many"] = Plan(
        (
            LayerChoice(heads, width, "int8(group=16)", None, None, "nf4"),
            LayerChoice(own.kv_heads, own.ffn, "int8(group=16, residual=16)", 32, "nf4", None),
        )
    )
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_what_is_predicted_is_counted(kind):
    model = tiny(kind, dtype=torch.float32)
    parts = anatomy.of(model)
    ledger = Ledger(parts, CONTEXT, BATCH)
    for name, plan in {
        "parent": ledger.parent,
        **plans(parts, 3 if kind == "llama" else 1),
    }.items():
        made = mock(ledger, plan)
        predicted = ledger.totals(plan)
        for what, count in counted(made, CONTEXT, BATCH).items():
            assert predicted[what] == count, (name, what)
        if not any(one in ("int8", "nf4") for row in plan.to_dicts() for one in row.values()):
            assert predicted["parameters"] == sum(p.numel() for p in made.parameters()), name
        tokens = sum(row["kv_bytes_per_token"] for row in described(made).layers if row["grows"])
        assert predicted["kv_bytes_per_token"] == tokens, name


def described(model):
    from effattn.surgery.describing import describe

    return describe(model)


def test_fixed_and_blocks_are_the_total():
    parts = anatomy.of(tiny("llama", dtype=torch.bfloat16))
    ledger = Ledger(parts, 40, 1)
    for plan in (ledger.parent, *plans(parts).values()):
        fixed, totals = ledger.fixed(), ledger.totals(plan)
        blocks = itertools.product(enumerate(plan.layers), ("attention", "ffn"))
        for (index, choice), block in blocks:
            for row in fixed:
                fixed[row] += ledger.block(index, block, choice)[row]
        assert fixed == {row: totals[row] for row in fixed}


def test_the_parent_keeps_its_weights():
    model = tiny("llama", dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    parts = anatomy.of(model)
    ledger = Ledger(parts, 8, 1)
    plan = plans(parts)["many"]
    mock(ledger, plan)
    finish(twin(parts, ()), ledger.parent.with_field("cache", "int8(group=16)"), ledger.parent)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_axes():
    assert axes_of(None, keep="weights") == ["cache", "window"]
    assert axes_of(("heads", "ffn"), forbid=("ffn",)) == ["heads"]
    with pytest.raises(ValueError, match=r"allow: got 'head'.*heads"):
        axes_of(("head",))
    with pytest.raises(ValueError, match="keep: got 'all'"):
        axes_of(None, keep="all")
    with pytest.raises(ValueError, match="no axis is left"):
        axes_of(("cache",), keep="cache")


def test_what_a_class_cannot_have():
    parts = anatomy.of(tiny("gpt_neox"))
    with pytest.raises(Unsupported, match=r"'heads': GPTNeoX.* cannot have it"):
        candidates(parts, ["heads"], 128, named=True)
    assert "kv_heads" not in candidates(parts, axes_of(None), 128)[0]


def test_packed_and_structured_weights_are_in_no_plan_together():
    """A config says one format of bitsandbytes, whose loader takes plain linears alone."""
    parts = anatomy.of(tiny("llama"))
    ladders = [
        {"latent": [8], "attention_weights": ["int8", "nf4", "2:4"], "ffn_weights": ["nf4", "2:4"]}
    ] * 2
    rows = [
        {"layer": i, "field": name, "value": value, "kl": 1e-3}
        for i, ladder in enumerate(ladders)
        for name, values in ladder.items()
        for value in values
    ]
    space = Space(Ledger(parts, 40, 1), ladders, Catalog(rows))
    assert space.kinds() == ["int8", "nf4", None]
    for kind in space.kinds():
        groups = space.groups(["bytes"], dict.fromkeys(AXES, 1.0), kind)
        chosen = [one.value[2].changes(space.parent.layers[0]) for g in groups for one in g]
        forms = {
            value if name != "latent" else name for own in chosen for name, value in own.items()
        }
        assert forms <= ({"latent", "2:4"} if kind is None else {kind}), kind
        assert forms


def test_formats_whose_harm_could_not_be_seen_are_left_out():
    layer = anatomy.of(tiny("llama")).layers[0]
    formats = OFFERS["cache", "cache"](layer, 512)
    assert "int8" in formats
    assert all(visible(Format.parse(one).fit(8)[0], 512) >= 0.2 for one in formats)
    assert "int8" not in OFFERS["cache", "cache"](layer, 128)  # whose groups are of 128 tokens
    with pytest.raises(Unsupported, match="windows of 32 tokens too few are packed"):
        OFFERS["cache", "cache"](layer, 32)


def test_rotated_formats_stay_apart_from_windows():
    own = LayerChoice(8, 96)
    assert not go_together(LayerChoice(8, 96, "int8(rotate='kv')", 32), own)
    assert go_together(LayerChoice(8, 96, "int8", 32), own)


@pytest.mark.parametrize(
    ("fields", "together"),
    [
        ({"latent": 8}, True),
        ({"latent": 8, "kv_heads": 4}, False),
        ({"latent": 8, "cache": "int8"}, False),
        ({"latent": 8, "window": 16}, False),
        ({"latent": 8, "attention_weights": "nf4"}, False),
        ({"latent": 8, "ffn": 0}, True),
        ({"kv_heads": 0}, True),
        ({"kv_heads": 0, "ffn": 0}, True),
        ({"kv_heads": 0, "cache": "int8"}, False),
        ({"kv_heads": 0, "attention_weights": "nf4"}, False),
        ({"ffn": 0, "ffn_weights": "nf4"}, False),
        ({"ffn": 64, "ffn_weights": "nf4"}, True),
        ({"ffn": 64, "ffn_weights": "lowrank(ratio=0.5)"}, False),
        ({"kv_heads": 4, "attention_weights": "2:4"}, False),
        ({"kv_heads": 4, "ffn_weights": "2:4", "cache": "int8"}, True),
    ],
)
def test_what_a_layer_can_have_at_once(fields, together):
    own = LayerChoice(8, 96)
    assert go_together(dataclasses.replace(own, **fields), own) is together


def test_plans_in_words():
    parent = Plan((LayerChoice(8, 96),) * 4)
    plan = parent.with_field("cache", "int8", [1, 2]).with_field("kv_heads", 2, [3])
    assert plan.specs("cache", parent) == {"1-2": "int8"}
    assert plan.lines(parent, "calibration=tokens") == [
        "effattn.shrink(model, kv_heads={'3': 2}, calibration=tokens)",
        "effattn.swap(model, cache={'1-2': 'int8'})",
    ]
    packed = parent.with_field("ffn_weights", "nf4").with_field("window", 64, [0])
    assert packed.lines(parent, "calibration=tokens") == [
        "effattn.shrink(model, ffn_weights={'0-3': 'nf4'})",
        "effattn.swap(model, {'0': 'sliding(window=64, sinks=4)'})",
    ]
    assert Plan.from_dicts(plan.to_dicts()) == plan
    assert plan.layers[3].words(parent.layers[3]) == "gqa(kv_heads=2)"


def test_lines_name_only_what_changes():
    """A layer that is already what its neighbours become cannot be made that again."""
    parent = Plan((LayerChoice(8, 96), LayerChoice(2, 96), LayerChoice(8, 96)))
    plan = parent.with_field("kv_heads", 2)
    assert plan.specs("kv_heads", parent) == {"0": 2, "2": 2}


def test_where_no_axis_alone_is_within_a_budget_two_are_what_a_plan_is_compared_with():
    parts = anatomy.of(tiny("llama"))
    formats = ["int8", "int4", "int4(rotate='kv')"]
    ladder = {"cache": formats, "attention_weights": ["int8", "nf4"], "ffn_weights": ["int8"]}
    ladders = [ladder | {"latent": [64]}] * len(parts.layers)
    harms = {"int8": 1e-3, "int4": 1e-2, "int4(rotate='kv')": 1e-4, "nf4": 1e-4, 64: 1e-9}
    rows = [
        {"layer": i, "field": name, "value": value, "kl": harms[value]}
        for i, values in enumerate(ladders)
        for name in values
        for value in values[name]
    ]
    space = Space(Ledger(parts, 4096, 4), ladders, Catalog(rows))
    each = {name: space.ledger.totals(plan)["bytes"] for _, name, plan in every_uniform(space)}
    # formats with their own options alone; nf4 is not for the FFN here, so that no plan has it
    assert set(each) == {
        "uniform cache int8",
        "uniform cache int4",
        "uniform latents of 64",
        "uniform weights int8",
    }
    least = min(each.values())
    assert list(uniform(space, {"bytes": least})) == ["uniform cache int4"]
    # latents go with no packed cache and no packed weights, which leaves this
    (name,) = both = uniform(space, {"bytes": least - 1})
    assert name == "uniform cache int4, weights int8"
    assert within(space, both[name], {"bytes": least - 1})
    assert len({change[1:] for change in both[name].changes(space.parent)}) == 3
    assert uniform(space, {"bytes": 1}) == {}
